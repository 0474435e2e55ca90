//! Go's own published vectors (package `time`, `time_test.go`: TestParseDuration,
//! TestParseDurationErrors, TestDurationString), and properties over arbitrary input.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use doze_lifecycle::duration::{GoDuration, parse};
use proptest::prelude::*;

const NS: i64 = 1;
const US: i64 = 1_000 * NS;
const MS: i64 = 1_000 * US;
const S: i64 = 1_000 * MS;
const M: i64 = 60 * S;
const H: i64 = 60 * M;

#[test]
fn reads_what_go_reads() {
    let vectors: &[(&str, i64)] = &[
        ("0", 0),
        ("5s", 5 * S),
        ("30s", 30 * S),
        ("1478s", 1478 * S),
        ("-5s", -5 * S),
        ("+5s", 5 * S),
        ("-0", 0),
        ("+0", 0),
        ("5.0s", 5 * S),
        ("5.6s", 5 * S + 600 * MS),
        ("5.s", 5 * S),
        (".5s", 500 * MS),
        ("1.0s", S),
        ("1.00s", S),
        ("1.004s", S + 4 * MS),
        ("1.0040s", S + 4 * MS),
        ("100.00100s", 100 * S + MS),
        ("10ns", 10),
        ("11us", 11 * US),
        ("12µs", 12 * US),
        ("12μs", 12 * US),
        ("13ms", 13 * MS),
        ("14s", 14 * S),
        ("15m", 15 * M),
        ("16h", 16 * H),
        ("3h30m", 3 * H + 30 * M),
        ("10.5s4m", 4 * M + 10 * S + 500 * MS),
        ("-2m3.4s", -(2 * M + 3 * S + 400 * MS)),
        ("1h2m3s4ms5us6ns", H + 2 * M + 3 * S + 4 * MS + 5 * US + 6),
        ("39h9m14.425s", 39 * H + 9 * M + 14 * S + 425 * MS),
        ("52763797000ns", 52_763_797_000),
        ("0.3333333333333333333h", 20 * M),
        ("9007199254740993ns", (1 << 53) + 1),
        ("9223372036854775807ns", i64::MAX),
        ("9223372036854775.807us", i64::MAX),
        ("9223372036s854ms775us807ns", i64::MAX),
        ("-9223372036854775808ns", i64::MIN),
        ("-9223372036854775.808us", i64::MIN),
        ("-9223372036s854ms775us808ns", i64::MIN),
        ("-9223372036854775808ns", i64::MIN),
        ("-2562047h47m16.854775808s", i64::MIN),
        ("0.100000000000000000000h", 6 * M),
        ("0.830103483285477580700h", 49 * M + 48 * S + 372_539_827),
    ];
    for (text, nanos) in vectors {
        assert_eq!(parse(text), Ok(GoDuration(*nanos)), "{text}");
    }
}

#[test]
fn refuses_what_go_refuses() {
    let vectors = [
        "",
        "3",
        "-",
        "s",
        ".",
        "-.",
        ".s",
        "+.s",
        "1d",
        "\u{85}\u{85}",
        "\u{ffff}",
        "hello \u{ffff} world",
        "9223372036854775810ns",
        "9223372036854775808ns",
        "-9223372036854775809ns",
        "9223372036854776us",
        "3000000h",
        "9223372036854775.808us",
        "9223372036854ms775us808ns",
        " 5s",
        "5s ",
        "5 s",
        "--5s",
        "1e3s",
    ];
    for text in vectors {
        assert!(parse(text).is_err(), "{text:?}");
    }
    assert!(parse(&"1s".repeat(5000)).is_err(), "an absurdly long one");
}

#[test]
fn prints_what_go_prints() {
    let vectors: &[(&str, i64)] = &[
        ("0s", 0),
        ("1ns", 1),
        ("1.1µs", 1100),
        ("2.2ms", 2200 * US),
        ("3.3s", 3300 * MS),
        ("4m5s", 4 * M + 5 * S),
        ("4m5.001s", 4 * M + 5001 * MS),
        ("5h6m7.001s", 5 * H + 6 * M + 7001 * MS),
        ("8m0.000000001s", 8 * M + 1),
        ("2562047h47m16.854775807s", i64::MAX),
        ("-2562047h47m16.854775808s", i64::MIN),
        ("1h30m0s", 90 * M),
        ("1.5s", 1500 * MS),
    ];
    for (text, nanos) in vectors {
        assert_eq!(GoDuration(*nanos).to_string(), *text);
    }
}

proptest! {
    #[test]
    fn what_is_printed_is_read_back(nanos in any::<i64>()) {
        prop_assert_eq!(parse(&GoDuration(nanos).to_string()), Ok(GoDuration(nanos)));
    }

    #[test]
    fn no_text_panics_or_hangs(text in "[-+0-9.nuµmsh \\PC]{0,60}") {
        let _outcome_does_not_matter = parse(&text);
    }
}
