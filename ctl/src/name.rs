//! Names of volumes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name: with a prefix and a suffix it still fits a file name and a udev property.
pub const NAME_MAX: usize = 63;

/// A volume's name: `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`. It is safe as a file name and in a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} can't be a volume's name: write 1 to {NAME_MAX} letters, digits, dots, dashes or underscores, the first a letter or a digit"
)]
pub struct NameError(String);

impl VolumeName {
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let valid =
            text.len() <= NAME_MAX && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric()) && text.bytes().all(inner);
        if valid { Ok(Self(text.to_owned())) } else { Err(NameError(text.to_owned())) }
    }
}

impl TryFrom<String> for VolumeName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> Self {
        name.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_safe_everywhere_are_names() {
        for good in ["a", "7", "vm-1.root_disk", &"x".repeat(63)] {
            assert_eq!(good.parse::<VolumeName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "-a", "_a", ".a", "a/b", "a b", "a\n", "é", "a\0", &"x".repeat(64)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
    }
}
