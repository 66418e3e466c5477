//! How many requests and bytes a second a volume may have, and how many at once after a pause.

use carrick_backing_store::ByteLength;
use carrick_backing_store::size::HumanSize;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A number of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Requests(u64);

impl Requests {
    /// So many.
    #[must_use]
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// How many.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Lowest limit of requests a second: the last of the deepest queue, 512, waits for less than a minute then. Guests complain of a
/// request after two.
pub const IOPS_MIN: Requests = Requests::new(10);
/// Highest one, and most that may come at once: far above what any volume does, so that more is a slip of the pen.
pub const IOPS_MAX: Requests = Requests::new(100_000_000);
/// Lowest limit of bytes a second: a request of 1 MiB takes a second then, and 128 of them are done before guests complain.
pub const BANDWIDTH_MIN: ByteLength = ByteLength::new(1 << 20);
/// Highest one, and most that may come at once. As with [`IOPS_MAX`].
pub const BANDWIDTH_MAX: ByteLength = ByteLength::new(1 << 40);

/// Limits of one volume's requests. Those above wait; none fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Most requests a second. A flush is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<Requests>,
    /// Requests above that which may come at once after a pause; `None`: a second's worth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<Requests>,
    /// Most bytes read and written in a second. Zeroes and discards carry none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<ByteLength>,
    /// Bytes above that which may come at once after a pause; `None`: a second's worth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<ByteLength>,
}

/// A limit that can't be: which one, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LimitsError {
    /// The field of [`Limits`].
    pub field: &'static str,
    /// For people.
    pub message: String,
}

impl Limits {
    /// Whether there are none.
    #[must_use]
    pub const fn are_none(&self) -> bool {
        self.iops.is_none() && self.bandwidth.is_none()
    }

    /// Requests that may come at once after a pause, above the rate; zero without one.
    #[must_use]
    pub fn requests_at_once(&self) -> Requests {
        self.iops_burst.or(self.iops).unwrap_or_default()
    }

    /// Bytes that may come at once after a pause, above the rate; zero without one.
    #[must_use]
    pub fn bytes_at_once(&self) -> ByteLength {
        self.bandwidth_burst.or(self.bandwidth).unwrap_or_default()
    }

    /// Whether they can be.
    ///
    /// # Errors
    /// The first one that can't.
    pub fn check(&self) -> Result<(), LimitsError> {
        let range = |field, what: &str, value: Option<u64>, (least, most): (u64, u64), text: fn(u64) -> String| match value {
            Some(value) if !(least..=most).contains(&value) => {
                let message = format!("{what} of {} is not possible: it is {} to {}, or none", text(value), text(least), text(most));
                Err(LimitsError { field, message })
            }
            _ => Ok(()),
        };
        let count = |requests: u64| requests.to_string();
        let size = |bytes: u64| HumanSize(bytes).to_string();
        let bytes = |length: Option<ByteLength>| length.map(ByteLength::get);
        let requests = |requests: Option<Requests>| requests.map(Requests::get);
        let (iops_max, bandwidth_max) = (IOPS_MAX.get(), BANDWIDTH_MAX.get());
        range("iops", "a limit of requests a second", requests(self.iops), (IOPS_MIN.get(), iops_max), count)?;
        range("iops_burst", "a burst of requests", requests(self.iops_burst), (1, iops_max), count)?;
        range("bandwidth", "a limit of bytes a second", bytes(self.bandwidth), (BANDWIDTH_MIN.get(), bandwidth_max), size)?;
        range("bandwidth_burst", "a burst of bytes", bytes(self.bandwidth_burst), (1, bandwidth_max), size)?;
        let alone = |field, rate: &str| {
            let message = format!("there is no limit that this burst could be above: set {rate} with it, or before");
            Err(LimitsError { field, message })
        };
        match self {
            Self { iops: None, iops_burst: Some(_), .. } => alone("iops_burst", "iops"),
            Self { bandwidth: None, bandwidth_burst: Some(_), .. } => alone("bandwidth_burst", "bandwidth"),
            _ => Ok(()),
        }
    }
}

/// What limits have done since the target's process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delays {
    /// Requests that had to wait and went on.
    pub requests: u64,
    /// For how long, all together, in microseconds.
    pub micros: u64,
    /// Requests that wait now.
    pub waiting: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(limits: Limits) -> &'static str {
        limits.check().unwrap_err().field
    }

    #[test]
    fn limits_that_cannot_be_are_refused_by_name() {
        let good = Limits { iops: Some(Requests::new(500)), bandwidth: Some(ByteLength::new(50 << 20)), ..Limits::default() };
        assert_eq!(good.check(), Ok(()));
        assert_eq!(Limits::default().check(), Ok(()));
        for wrong in [0, 9, 100_000_001, u64::MAX] {
            assert_eq!(refused(Limits { iops: Some(Requests::new(wrong)), ..good }), "iops");
        }
        for wrong in [0, (1 << 20) - 1, (1 << 40) + 1, u64::MAX] {
            assert_eq!(refused(Limits { bandwidth: Some(ByteLength::new(wrong)), ..good }), "bandwidth");
        }
        for wrong in [0, u64::MAX] {
            assert_eq!(refused(Limits { iops_burst: Some(Requests::new(wrong)), ..good }), "iops_burst");
            assert_eq!(refused(Limits { bandwidth_burst: Some(ByteLength::new(wrong)), ..good }), "bandwidth_burst");
        }
        assert_eq!(refused(Limits { iops: None, iops_burst: Some(Requests::new(1)), ..good }), "iops_burst");
        assert_eq!(refused(Limits { bandwidth: None, bandwidth_burst: Some(ByteLength::new(1)), ..good }), "bandwidth_burst");
    }

    #[test]
    fn a_burst_is_a_seconds_worth_unless_it_is_given() {
        let limits = Limits { iops: Some(Requests::new(500)), bandwidth: Some(ByteLength::new(50 << 20)), ..Limits::default() };
        assert_eq!((limits.requests_at_once().get(), limits.bytes_at_once().get()), (500, 50 << 20));
        let limits = Limits { iops_burst: Some(Requests::new(7)), bandwidth_burst: Some(ByteLength::new(8)), ..limits };
        assert_eq!((limits.requests_at_once().get(), limits.bytes_at_once().get()), (7, 8));
    }

    #[test]
    fn what_is_not_limited_is_not_written_down() {
        assert_eq!(serde_json::to_string(&Limits::default()).unwrap(), "{}");
        let limits: Limits = serde_json::from_str(r#"{"iops":500}"#).unwrap();
        assert_eq!(limits, Limits { iops: Some(Requests::new(500)), ..Limits::default() });
        // Of a newer release.
        assert_eq!(serde_json::from_str::<Limits>(r#"{"colour":1}"#).unwrap(), Limits::default());
    }
}
