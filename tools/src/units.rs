//! Sizes and durations as people type and read them.

use std::time::Duration;

/// Parses a size: a number of bytes, or with K, M, G, T (powers of 1024; `KiB` and the like are fine too). Fractions are not taken.
///
/// # Errors
/// A sentence that says what to give.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("`{text}` is not a size; give bytes or a number with M or G, for example 512M or 1G");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit = unit.trim_start().to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    number.checked_shl(shift).filter(|bytes| bytes >> shift == number).ok_or_else(wrong)
}

/// Parses the RAM of a machine, and says what would be right.
///
/// # Errors
/// A sentence that says what to give.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    wire::units::RamSize::from_bytes(bytes).map(wire::units::RamSize::bytes).map_err(|_| {
        format!("a machine cannot have {text} of RAM; give a multiple of 2M from 16M to 1T, for example 1G")
    })
}

/// Parses a duration: a number with us, ms, s or m.
///
/// # Errors
/// A sentence that says what to give.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration; give a number with us, ms, s or m, for example 10ms");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let us_per_unit: u64 = match unit {
        "us" => 1,
        "ms" => 1000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(us_per_unit).map(Duration::from_micros).ok_or_else(wrong)
}

/// Shows bytes with a binary unit: `1 GiB`, `512 MiB`, `1.5 GiB`.
pub fn show_bytes(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in units {
        let one = 1_u64 << shift;
        if bytes >= one {
            let tenths = u128::from(bytes) * 10 / u128::from(one);
            let (whole, tenth) = (tenths / 10, tenths % 10);
            return if tenth == 0 { format!("{whole} {unit}") } else { format!("{whole}.{tenth} {unit}") };
        }
    }
    format!("{bytes} B")
}

/// Shows a duration with its two largest units: `3d 4h`, `12m 5s`, `850ms`.
pub fn show_ms(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes, seconds) {
        (1.., ..) => format!("{days}d {hours}h"),
        (0, 1.., ..) => format!("{hours}h {minutes}m"),
        (0, 0, 1.., _) => format!("{minutes}m {}s", seconds % 60),
        (0, 0, 0, 1..) => format!("{seconds}s"),
        _ => format!("{ms}ms"),
    }
}

/// Shows microseconds as milliseconds with two decimals.
pub fn show_us(us: u64) -> String {
    format!("{}.{:02} ms", us / 1000, us % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512M", 512 << 20),
            ("1G", 1 << 30),
            ("2GiB", 2 << 30),
            ("1t", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "G", "-1G", "1.5G", "1X", "99999999999T", "18446744073709551616"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_memory("1G"), Ok(1 << 30));
        for bad in ["0", "1M", "17M", "2T"] {
            assert!(parse_memory(bad).unwrap_err().contains("multiple of 2M"), "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("10ms"), Ok(Duration::from_millis(10)));
        assert_eq!(parse_duration("250us"), Ok(Duration::from_micros(250)));
        for bad in ["", "10", "ms", "1h", "-1s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown() {
        assert_eq!(show_bytes(1 << 30), "1 GiB");
        assert_eq!(show_bytes(3 << 29), "1.5 GiB");
        assert_eq!(show_bytes(100), "100 B");
        assert_eq!(show_ms(90_061_000), "1d 1h");
        assert_eq!(show_ms(125_000), "2m 5s");
        assert_eq!(show_ms(12), "12ms");
        assert_eq!(show_us(12_345), "12.34 ms");
    }
}
