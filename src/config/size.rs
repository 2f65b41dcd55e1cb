// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Byte counts as people write them, and as they read them.

/// What is wrong with a byte count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SizeError {
    /// Not `digits[suffix]`.
    #[error("must be a number of bytes, with KiB, MiB, GiB or TiB if you like")]
    Syntax,
    /// Above 2^63 - 1, the largest file offset there is.
    #[error("is larger than any file")]
    TooLarge,
}

const UNITS: [(&str, &str, u32); 4] =
    [("KiB", "K", 10), ("MiB", "M", 20), ("GiB", "G", 30), ("TiB", "T", 40)];

/// Reads `4096`, `64KiB`, `10G`. All units are powers of 1024; `K` is `KiB`, as in losetup(8).
///
/// # Errors
/// Not a number of bytes, or more than a file can have.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let suffix = text.get(digits.len()..).unwrap_or_default().trim_start();
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(SizeError::Syntax);
    }
    let shift = match suffix {
        "" | "B" => 0,
        _ => UNITS
            .iter()
            .find(|(long, short, _)| {
                suffix.eq_ignore_ascii_case(long) || suffix.eq_ignore_ascii_case(short)
            })
            .map(|(_, _, shift)| *shift)
            .ok_or(SizeError::Syntax)?,
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or(SizeError::TooLarge)
}

/// `bytes` with the largest unit that leaves at least 1 in front: `1.5 GiB`.
#[must_use]
pub fn human(bytes: u64) -> String {
    let unit = UNITS.iter().rev().find(|(_, _, shift)| bytes >> shift > 0);
    let Some((name, _, shift)) = unit else { return format!("{bytes} B") };
    let whole = bytes >> shift;
    let tenths = ((bytes & ((1 << shift) - 1)) * 10) >> shift;
    if tenths == 0 { format!("{whole} {name}") } else { format!("{whole}.{tenths} {name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1 << 10),
            ("3KiB", 3 << 10),
            ("2 MiB", 2 << 20),
            ("10g", 10 << 30),
            ("1TiB", 1 << 40),
            ("512B", 512),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "K", "-1", "1.5G", "1KB", "1 K i B", "0x10", "12é", "1e3", "1PiB"] {
            assert_eq!(parse_size(text), Err(SizeError::Syntax), "{text}");
        }
        for text in ["9223372036854775808", "99999999999999999999", "8388608TiB"] {
            assert_eq!(parse_size(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(1 << 40), "1 TiB");
        assert_eq!(human(u64::MAX), "16777215.9 TiB");
    }
}
