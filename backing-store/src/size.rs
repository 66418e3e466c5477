//! Sizes as people write and read them.

use std::fmt;

/// Units that may be written. The short ones are binary, as in `qemu-img`, `lvcreate` and `truncate`; `kB`…`TB` are decimal,
/// as on a disk's label and in `truncate`.
const UNITS: [(&str, u64); 16] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("p", 1 << 50),
    ("pib", 1 << 50),
];

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number and a unit.
    #[error(
        "{0:?} is not a size: write a number of bytes, or a whole number with K, M, G or T (powers of 1024) or kB, MB, GB or TB (powers of 1000), such as 20G"
    )]
    Malformed(String),
    /// Above 2^64.
    #[error("{0:?} is more bytes than can be counted")]
    TooLarge(String),
}

/// Reads a size such as `20G`, `512MiB`, `10GB` or `4096`. Upper and lower case mean the same.
///
/// # Errors
/// [`SizeError`].
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let malformed = || SizeError::Malformed(text.to_owned());
    let trimmed = text.trim();
    let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = trimmed.split_at(digits);
    if number.is_empty() {
        return Err(malformed());
    }
    let unit = unit.trim_start().to_ascii_lowercase();
    let (_, factor) = UNITS.iter().find(|(known, _)| *known == unit).ok_or_else(malformed)?;
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge(text.to_owned()))?;
    number.checked_mul(*factor).ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

/// Shows a number of bytes in the largest binary unit in which it has at least one, with one decimal unless it is whole.
#[derive(Clone, Copy, Debug)]
pub struct HumanSize(pub u64);

impl fmt::Display for HumanSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        let (shift, unit) = match bytes {
            0..0x400 => return f.pad(&format!("{bytes} B")),
            0x400..0x10_0000 => (10, "KiB"),
            0x10_0000..0x4000_0000 => (20, "MiB"),
            0x4000_0000..0x100_0000_0000 => (30, "GiB"),
            _ => (40, "TiB"),
        };
        let whole = bytes >> shift;
        // Tenths, rounded down: a store never looks emptier than it is.
        let tenths = ((bytes & ((1 << shift) - 1)) * 10) >> shift;
        if tenths == 0 { f.pad(&format!("{whole} {unit}")) } else { f.pad(&format!("{whole}.{tenths} {unit}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_mean_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("20G", 20 << 30),
            ("20 GiB", 20 << 30),
            ("20gib", 20 << 30),
            ("20GB", 20_000_000_000),
            ("1T", 1 << 40),
            ("1TB", 1_000_000_000_000),
            ("4P", 4 << 50),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "G", "-1", "+1", "1.5G", "1X", "0x10", "1e9", "1 0", "1GiBB", "١G"] {
            assert_eq!(parse_size(text), Err(SizeError::Malformed(text.to_owned())));
        }
        for text in ["18446744073709551616", "16777216T", "99999999999999999999999G"] {
            assert_eq!(parse_size(text), Err(SizeError::TooLarge(text.to_owned())));
        }
    }

    #[test]
    fn sizes_are_shown_short_and_never_rounded_up() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (20 << 30, "20 GiB"),
            ((1 << 40) - 1, "1023.9 GiB"),
            (3 << 39, "1.5 TiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(HumanSize(bytes).to_string(), text);
        }
        assert_eq!(format!("{:>8}", HumanSize(4096)), "   4 KiB");
    }
}
