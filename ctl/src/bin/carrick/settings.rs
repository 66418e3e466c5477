//! `carrick volume set NAME KEY=VALUE…`.

use carrick_backing_store::size::parse_size;
use carrick_ctl::fault::Fault;
use carrick_ctl::v1::SetVolumeRequest;

/// What can be changed of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Bytes a second.
    RebuildRate,
    /// Requests a second.
    Iops,
    /// Requests.
    IopsBurst,
    /// Bytes a second.
    Bandwidth,
    /// Bytes.
    BandwidthBurst,
}

const KEYS: [(&str, Key); 5] = [
    ("rebuild-rate", Key::RebuildRate),
    ("iops", Key::Iops),
    ("iops-burst", Key::IopsBurst),
    ("bandwidth", Key::Bandwidth),
    ("bandwidth-burst", Key::BandwidthBurst),
];

/// A change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    key: Key,
    /// `None`: take it away.
    value: Option<u64>,
}

impl Setting {
    /// Reads `KEY=VALUE`.
    ///
    /// # Errors
    /// In words, what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("write KEY=VALUE, such as iops=500, bandwidth=50M or rebuild-rate=50M")?;
        let Some((_, key)) = KEYS.iter().find(|(known, _)| *known == name) else {
            let names = KEYS.map(|(name, _)| name);
            return Err(format!("there is no setting {name}; there are {}", names.join(", ")));
        };
        let value = match (value, key) {
            ("none", _) => None,
            (number, Key::Iops | Key::IopsBurst) => Some(
                number.parse().map_err(|_| format!("{name}: {number:?} is not a number of requests: write one such as 500, or none"))?,
            ),
            (size, _) => Some(parse_size(size).map_err(|error| format!("{name}: {error}"))?),
        };
        Ok(Self { key: *key, value })
    }
}

/// What the daemon is asked. Of a key that is given twice, the last counts.
///
/// # Errors
/// A limit of zero: in the request it takes the limit away, which is not what somebody means who writes it.
pub fn request(name: String, settings: &[Setting]) -> Result<SetVolumeRequest, Fault> {
    let mut request = SetVolumeRequest { name, ..SetVolumeRequest::default() };
    for Setting { key, value } in settings {
        let (field, field_name) = match key {
            Key::RebuildRate => (&mut request.rebuild_rate, "rebuild_rate"),
            Key::Iops => (&mut request.iops, "iops"),
            Key::IopsBurst => (&mut request.iops_burst, "iops_burst"),
            Key::Bandwidth => (&mut request.bandwidth, "bandwidth"),
            Key::BandwidthBurst => (&mut request.bandwidth_burst, "bandwidth_burst"),
        };
        if *value == Some(0) && *key != Key::RebuildRate {
            let message = format!("{field_name} of 0 would let nothing through: give more, or none to take it away");
            return Err(Fault::invalid(field_name, message));
        }
        *field = Some(value.unwrap_or(0));
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(settings: &[&str]) -> Result<SetVolumeRequest, Fault> {
        let settings: Vec<Setting> = settings.iter().map(|text| Setting::parse(text).unwrap()).collect();
        request("vm1".into(), &settings)
    }

    #[test]
    fn settings_become_fields_and_none_takes_away() {
        let request = asked(&["iops=500", "bandwidth=50M", "bandwidth-burst=1G", "rebuild-rate=none", "iops=none"]).unwrap();
        assert_eq!((request.iops, request.iops_burst), (Some(0), None), "the last counts");
        assert_eq!((request.bandwidth, request.bandwidth_burst, request.rebuild_rate), (Some(50 << 20), Some(1 << 30), Some(0)));
    }

    #[test]
    fn zero_is_refused_by_name() {
        for (text, field) in
            [("iops=0", "iops"), ("iops-burst=0", "iops_burst"), ("bandwidth=0", "bandwidth"), ("bandwidth-burst=0M", "bandwidth_burst")]
        {
            assert_eq!(asked(&[text]).unwrap_err().subject, field);
        }
    }

    #[test]
    fn what_is_no_setting_says_what_there_is() {
        assert!(Setting::parse("colour=blue").unwrap_err().contains("rebuild-rate, iops, iops-burst, bandwidth, bandwidth-burst"));
        assert!(Setting::parse("iops").unwrap_err().contains("iops=500"));
        assert!(Setting::parse("iops=5k").unwrap_err().starts_with("iops: \"5k\" is not a number of requests"));
        assert!(Setting::parse("bandwidth=fast").unwrap_err().starts_with("bandwidth: \"fast\" is not a size"));
    }
}
