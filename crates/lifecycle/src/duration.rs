//! Durations exactly as Go's `time.ParseDuration` reads and `Duration.String` prints them, because
//! that is what the contract's clients send and expect. Source of the grammar and of the test
//! vectors: the documentation of Go's package `time`.
use std::{fmt, time::Duration};

/// Signed nanoseconds, as in Go: about ±292 years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GoDuration(pub i64);

/// What is wrong with the text, and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{input:?} is not a duration ({reason}); allowed: numbers with units, like 300ms, 1.5s, 2m, 1h30m (ns, us, ms, s, m, h)"
)]
pub struct ParseDurationError {
    pub input: String,
    pub reason: &'static str,
}

const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// Longer texts are refused unread; no duration needs them.
const MAX_LEN: usize = 4096;

fn unit_nanos(unit: &str) -> Option<u64> {
    Some(match unit {
        "ns" => 1,
        // U+00B5 micro sign and U+03BC Greek mu, both as in Go.
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => NANOS_PER_SECOND,
        "m" => 60 * NANOS_PER_SECOND,
        "h" => 3600 * NANOS_PER_SECOND,
        _ => return None,
    })
}

/// Leading decimal digits. `None` beyond 2^63, as in Go.
fn leading_int(s: &str) -> Option<(u64, &str)> {
    let end = s
        .bytes()
        .position(|b| !b.is_ascii_digit())
        .unwrap_or(s.len());
    let mut value: u64 = 0;
    for digit in s.bytes().take(end) {
        value = value
            .checked_mul(10)?
            .checked_add(u64::from(digit - b'0'))?;
        if value > 1 << 63 {
            return None;
        }
    }
    Some((value, &s[end..]))
}

/// Digits after the point as value and scale; digits beyond 63 bits are read and ignored, as in Go.
fn leading_fraction(s: &str) -> (u64, f64, &str) {
    let end = s
        .bytes()
        .position(|b| !b.is_ascii_digit())
        .unwrap_or(s.len());
    let (mut value, mut scale, mut full) = (0u64, 1f64, false);
    for digit in s.bytes().take(end) {
        if full {
            continue;
        }
        let next = if value > (i64::MAX as u64) / 10 {
            None
        } else {
            Some(value * 10 + u64::from(digit - b'0')).filter(|n| *n <= 1 << 63)
        };
        match next {
            Some(next) => {
                value = next;
                scale *= 10.0;
            }
            None => full = true,
        }
    }
    (value, scale, &s[end..])
}

/// Reads a duration.
///
/// # Errors
/// [`ParseDurationError`] for everything Go refuses, and for texts longer than 4096 bytes.
pub fn parse(input: &str) -> Result<GoDuration, ParseDurationError> {
    let fail = |reason| ParseDurationError {
        input: input.chars().take(64).collect(),
        reason,
    };
    if input.len() > MAX_LEN {
        return Err(fail("too long"));
    }
    let (negative, mut rest) = match input.as_bytes().first() {
        Some(b'-') => (true, &input[1..]),
        Some(b'+') => (false, &input[1..]),
        _ => (false, input),
    };
    if rest == "0" {
        return Ok(GoDuration(0));
    }
    if rest.is_empty() {
        return Err(fail("empty"));
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let (nanos, after) = component(rest).map_err(fail)?;
        total = total
            .checked_add(nanos)
            .filter(|t| *t <= 1 << 63)
            .ok_or_else(|| fail("too large"))?;
        rest = after;
    }
    if negative {
        return Ok(GoDuration(0i64.wrapping_sub_unsigned(total)));
    }
    i64::try_from(total)
        .map(GoDuration)
        .map_err(|_| fail("too large"))
}

/// One number with its unit.
fn component(s: &str) -> Result<(u64, &str), &'static str> {
    let first = s.as_bytes().first().copied().unwrap_or(0);
    if first != b'.' && !first.is_ascii_digit() {
        return Err("a number is expected");
    }
    let (whole, after_whole) = leading_int(s).ok_or("too large")?;
    let has_whole = after_whole.len() != s.len();
    let (fraction, scale, after_number, has_fraction) = match after_whole.strip_prefix('.') {
        Some(digits) => {
            let (fraction, scale, after) = leading_fraction(digits);
            (fraction, scale, after, after.len() != digits.len())
        }
        None => (0, 1.0, after_whole, false),
    };
    if !has_whole && !has_fraction {
        return Err("a number is expected");
    }
    let end = after_number
        .bytes()
        .position(|b| b == b'.' || b.is_ascii_digit())
        .unwrap_or(after_number.len());
    if end == 0 {
        return Err("missing unit");
    }
    let unit = unit_nanos(&after_number[..end]).ok_or("unknown unit")?;
    let mut nanos = whole
        .checked_mul(unit)
        .filter(|n| *n <= 1 << 63)
        .ok_or("too large")?;
    if fraction > 0 {
        // Truncating through f64 is what Go does; the result is below one unit.
        nanos += (fraction as f64 * (unit as f64 / scale)) as u64;
        if nanos > 1 << 63 {
            return Err("too large");
        }
    }
    Ok((nanos, &after_number[end..]))
}

impl GoDuration {
    /// `None` when negative.
    pub fn to_std(self) -> Option<Duration> {
        u64::try_from(self.0).ok().map(Duration::from_nanos)
    }
    /// Saturates at Go's maximum.
    pub fn from_std(duration: Duration) -> GoDuration {
        GoDuration(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX))
    }
}

impl std::str::FromStr for GoDuration {
    type Err = ParseDurationError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        parse(s)
    }
}

/// `value / unit` with the fraction's trailing zeros left out.
fn fractional(value: u64, unit: u64) -> String {
    let (whole, rest) = (value / unit, value % unit);
    if rest == 0 {
        return whole.to_string();
    }
    let width = unit.ilog10() as usize;
    let digits = format!("{rest:0width$}");
    format!("{whole}.{}", digits.trim_end_matches('0'))
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.unsigned_abs();
        if nanos == 0 {
            return f.write_str("0s");
        }
        if self.0 < 0 {
            f.write_str("-")?;
        }
        match nanos {
            0..1_000 => return write!(f, "{nanos}ns"),
            1_000..1_000_000 => return write!(f, "{}\u{b5}s", fractional(nanos, 1_000)),
            1_000_000..NANOS_PER_SECOND => {
                return write!(f, "{}ms", fractional(nanos, 1_000_000));
            }
            NANOS_PER_SECOND.. => {}
        }
        let minutes_total = nanos / NANOS_PER_SECOND / 60;
        let seconds = fractional(
            nanos - minutes_total * 60 * NANOS_PER_SECOND,
            NANOS_PER_SECOND,
        );
        let (hours, minutes) = (minutes_total / 60, minutes_total % 60);
        if hours > 0 {
            write!(f, "{hours}h{minutes}m{seconds}s")
        } else if minutes > 0 {
            write!(f, "{minutes}m{seconds}s")
        } else {
            write!(f, "{seconds}s")
        }
    }
}
