//! Values out of the document, by JSON pointer (RFC 6901). What is missing or of another type is `None`.

use serde_json::Value;

use crate::terminal::escaped;

/// A string, escaped.
pub(super) fn text(value: &Value, pointer: &str) -> Option<String> {
    Some(escaped(value.pointer(pointer)?.as_str()?))
}

/// Whatever stands there, short: strings escaped and without quotes.
pub(super) fn any(value: &Value, pointer: &str) -> Option<String> {
    match value.pointer(pointer)? {
        Value::Null => None,
        Value::String(text) => Some(escaped(text)),
        other => Some(escaped(&other.to_string())),
    }
}

/// A whole number, or one in a string, as large ones are written (`0x7f…`).
pub(super) fn number(value: &Value, pointer: &str) -> Option<u64> {
    match value.pointer(pointer)? {
        Value::String(text) => match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        },
        value => value.as_u64(),
    }
}

/// A number.
pub(super) fn float(value: &Value, pointer: &str) -> Option<f64> {
    value
        .pointer(pointer)?
        .as_f64()
        .filter(|number| number.is_finite())
}

/// Yes or no.
pub(super) fn flag(value: &Value, pointer: &str) -> Option<bool> {
    value.pointer(pointer)?.as_bool()
}

/// A list; empty if there is none.
pub(super) fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// What stands there, `Null` if nothing.
pub(super) fn part<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or(&Value::Null)
}

/// `2026-11-22 20:53:37 UTC` from Unix time in seconds.
pub(super) fn date_and_time(unix: f64) -> Option<String> {
    Some(format!("{} {} UTC", date(unix)?, clock(unix, 0)?))
}

/// `2026-11-22`, in UTC.
pub(super) fn date(unix: f64) -> Option<String> {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let mut days = seconds(unix)? / 86_400;
    // The calendar repeats after 400 years; what is left is less than 800 rounds of the loops below.
    let mut year = 1970 + days / DAYS_OF_400_YEARS * 400;
    days %= DAYS_OF_400_YEARS;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    Some(format!("{year:04}-{month:02}-{:02}", days + 1))
}

/// `20:53:37`, in UTC, with so many (0 or 3) digits behind the point.
pub(super) fn clock(unix: f64, digits: usize) -> Option<String> {
    // Rounded before it is taken apart: 0.51 is a little less in binary.
    let thousandths = (unix * 1e3).round();
    let whole = seconds(thousandths / 1e3)?;
    let (hours, minutes, left) = (whole / 3600 % 24, whole / 60 % 60, whole % 60);
    let text = format!("{hours:02}:{minutes:02}:{left:02}");
    Some(match digits {
        0 => text,
        _ => format!("{text}.{:03}", thousandths as u64 % 1000),
    })
}

/// Whole seconds of a time that a calendar can show.
fn seconds(unix: f64) -> Option<u64> {
    const END_OF_9999: f64 = 253_402_300_800.0;
    (0.0..END_OF_9999).contains(&unix).then_some(unix as u64)
}

/// `4 d 3 h`, `12 min 3 s`, `0.5 s`: the two largest units.
pub(super) fn span(length: f64) -> String {
    let whole = length.max(0.0) as u64;
    match whole {
        0..10 => format!("{:.1} s", length.max(0.0)),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86_400, whole / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_missing_or_of_another_type_is_none() {
        let value =
            json!({"a": {"b": "x\u{1b}", "n": 7, "h": "0x10", "big": "0xfffffffffffffffffff", "f": 0.5}});
        assert_eq!(text(&value, "/a/b").as_deref(), Some("x\\u{1b}"));
        assert_eq!(text(&value, "/a/n"), None);
        assert_eq!(any(&value, "/a/n").as_deref(), Some("7"));
        assert_eq!(any(&value, "/a/x"), None);
        assert_eq!(number(&value, "/a/n"), Some(7));
        assert_eq!(number(&value, "/a/h"), Some(16));
        assert_eq!(number(&value, "/a/big"), None);
        assert_eq!(number(&value, "/a/f"), None);
        assert_eq!(float(&value, "/a/f"), Some(0.5));
        assert!(list(&value, "/a").is_empty());
        assert_eq!(flag(&value, "/a/n"), None);
        assert!(part(&value, "/x/y").is_null());
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (unix, shown) in [
            (0.0, "1970-01-01 00:00:00 UTC"),
            (68_169_599.0, "1972-02-28 23:59:59 UTC"),
            (68_169_600.0, "1972-02-29 00:00:00 UTC"),
            (951_868_800.0, "2000-03-01 00:00:00 UTC"),
            (1_795_380_817.25, "2026-11-22 20:53:37 UTC"),
            (4_107_542_400.0, "2100-03-01 00:00:00 UTC"),
            (253_402_300_799.0, "9999-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(date_and_time(unix).as_deref(), Some(shown));
        }
        for unix in [-1.0, f64::NAN, f64::INFINITY, 253_402_300_800.0] {
            assert_eq!(date_and_time(unix), None);
        }
        assert_eq!(clock(1_795_380_817.25, 3).as_deref(), Some("20:53:37.250"));
        assert_eq!(clock(44.51, 3).as_deref(), Some("00:00:44.510"));
        assert_eq!(clock(59.9999, 3).as_deref(), Some("00:01:00.000"));
    }

    #[test]
    fn spans_have_two_units() {
        for (length, shown) in [
            (-1.0, "0.0 s"),
            (0.25, "0.2 s"),
            (42.9, "42 s"),
            (3599.0, "59 min 59 s"),
            (86_399.0, "23 h 59 min"),
            (356_400.0, "4 d 3 h"),
        ] {
            assert_eq!(span(length), shown);
        }
    }
}
