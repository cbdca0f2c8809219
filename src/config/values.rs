//! Scalars of the schema. Each type can only hold what its text may say, so its bounds stand here once, for the
//! parser and for the JSON Schema.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::HOST_CID;
use super::diagnostic::quoted;
use super::given::Refusal;

/// A scalar that is written as text.
pub(super) trait Text: Sized {
    /// What the text should be, as the object of "give".
    const EXPECTED: &'static str;

    fn parse(text: &str) -> Result<Self, Refusal>;

    /// A number where text belongs; mostly the reason for a remedy.
    fn parse_number(number: u64) -> Result<Self, Refusal> {
        Err(Refusal::new(
            format!("{number} is of the wrong type (a number)"),
            format!(
                "give {}; YAML reads it as text when it stands in quotes",
                Self::EXPECTED
            ),
        ))
    }
}

/// A scalar that is written as a whole number.
pub(super) trait Number: Sized {
    const EXPECTED: &'static str;

    fn from_number(number: u64) -> Result<Self, Refusal>;
}

struct TextVisitor<T>(PhantomData<T>);

impl<T: Text> Visitor<'_> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        T::parse(text).map_err(E::custom)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
        T::parse_number(number).map_err(E::custom)
    }
}

struct NumberVisitor<T>(PhantomData<T>);

impl<T: Number> Visitor<'_> for NumberVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
        T::from_number(number).map_err(E::custom)
    }
}

/// Reads a [`Text`]; a number is offered to it as well, for its remedy.
pub(super) fn deserialize_text<'de, T: Text, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(TextVisitor(PhantomData))
}

/// `Deserialize` by [`Text`] and `Serialize` by `Display`.
macro_rules! text_serde {
    ($($name:ty),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::config::values::deserialize_text(deserializer)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}
pub(super) use text_serde;

macro_rules! number_serde {
    ($($name:ty),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_u64(NumberVisitor(PhantomData))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }
    )*};
}

/// `JsonSchema` of a scalar, in place rather than by reference.
macro_rules! scalar_schema {
    ($name:ty, $schema:expr) => {
        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $schema
            }
        }
    };
}
pub(super) use scalar_schema;

text_serde!(Name, Period, PortRange, LogLevel);
number_serde!(Cid, AddressedCid, GuestPort, Connections, PerSecond);

/// A name of a guest or rule: a DNS label, so that it can be a Kubernetes name and needs no quoting anywhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Name(pub(super) String);

impl Text for Name {
    const EXPECTED: &'static str =
        "a name of 1 to 63 lower-case letters, digits and `-`, with a letter or digit at both ends";

    fn parse(text: &str) -> Result<Name, Refusal> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if (1..=63).contains(&text.len())
            && text.bytes().all(inner)
            && !text.starts_with('-')
            && !text.ends_with('-')
        {
            Ok(Name(text.to_owned()))
        } else {
            Err(Refusal::new(
                format!("{} is no name", quoted(text)),
                format!("give {}", Self::EXPECTED),
            ))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

scalar_schema!(
    Name,
    json_schema!({"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"})
);

/// A context identifier that a guest may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cid(pub(super) u32);

impl Cid {
    const RANGE: RangeInclusive<u32> = 3..=0xffff_fffe;
}

impl Number for Cid {
    const EXPECTED: &'static str = "a number from 3 to 4294967294";

    fn from_number(number: u64) -> Result<Cid, Refusal> {
        let meaning = match number {
            0 => "stands for the hypervisor (VMADDR_CID_HYPERVISOR)",
            1 => "stands for loopback (VMADDR_CID_LOCAL)",
            2 => "stands for the host (VMADDR_CID_HOST)",
            0xffff_ffff => "stands for any CID (VMADDR_CID_ANY)",
            _ => "has more than 32 bits",
        };
        match u32::try_from(number) {
            Ok(cid) if Cid::RANGE.contains(&cid) => Ok(Cid(cid)),
            _ => Err(Refusal::new(
                format!("{number} can be no guest's CID: it {meaning}"),
                format!("give {}, one that no other guest has", Self::EXPECTED),
            )),
        }
    }
}

scalar_schema!(
    Cid,
    json_schema!({"type": "integer", "minimum": 3, "maximum": 0xffff_fffeu32})
);

/// A context identifier that a guest may connect to: the host's, or that of another guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressedCid(pub(super) u32);

impl Number for AddressedCid {
    const EXPECTED: &'static str = "2 for the host, or a number from 3 to 4294967294";

    fn from_number(number: u64) -> Result<AddressedCid, Refusal> {
        let meaning = match number {
            0 => "it stands for the hypervisor, which is not us (VMADDR_CID_HYPERVISOR)",
            1 => "the guest keeps it for itself (VMADDR_CID_LOCAL)",
            0xffff_ffff => "it stands for any CID (VMADDR_CID_ANY)",
            _ => "it has more than 32 bits",
        };
        match u32::try_from(number) {
            Ok(cid) if cid == HOST_CID || Cid::RANGE.contains(&cid) => Ok(AddressedCid(cid)),
            _ => Err(Refusal::new(
                format!("no connection to CID {number} comes here: {meaning}"),
                format!("give {}", Self::EXPECTED),
            )),
        }
    }
}

scalar_schema!(
    AddressedCid,
    json_schema!({"type": "integer", "minimum": 2, "maximum": 0xffff_fffeu32})
);

/// A vsock port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestPort(pub(super) u32);

impl GuestPort {
    pub(super) const RANGE: RangeInclusive<u32> = 1..=0xffff_fffe;
}

impl Number for GuestPort {
    const EXPECTED: &'static str = "a vsock port from 1 to 4294967294";

    fn from_number(number: u64) -> Result<GuestPort, Refusal> {
        match u32::try_from(number) {
            Ok(port) if GuestPort::RANGE.contains(&port) => Ok(GuestPort(port)),
            Ok(u32::MAX) => Err(Refusal::new(
                format!("{number} is no port: it stands for any port (VMADDR_PORT_ANY)"),
                format!("give {}", Self::EXPECTED),
            )),
            _ => Err(Refusal::new(
                format!("{number} is no vsock port"),
                format!("give {}", Self::EXPECTED),
            )),
        }
    }
}

scalar_schema!(
    GuestPort,
    json_schema!({"type": "integer", "minimum": 1, "maximum": 0xffff_fffeu32})
);

/// How many connections a guest may have at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connections(pub(super) u32);

impl Number for Connections {
    const EXPECTED: &'static str = "a number from 1 to 1000000";

    fn from_number(number: u64) -> Result<Connections, Refusal> {
        match u32::try_from(number) {
            Ok(count) if (1..=1_000_000).contains(&count) => Ok(Connections(count)),
            _ => Err(Refusal::new(
                format!("{number} is no usable limit of connections"),
                format!("give {}", Self::EXPECTED),
            )),
        }
    }
}

scalar_schema!(
    Connections,
    json_schema!({"type": "integer", "minimum": 1, "maximum": 1_000_000})
);

/// How many connections may begin in a second; 0 is no bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PerSecond(pub(super) u32);

impl Number for PerSecond {
    const EXPECTED: &'static str = "a number from 1 to 1000000, or 0 for no bound";

    fn from_number(number: u64) -> Result<PerSecond, Refusal> {
        match u32::try_from(number) {
            Ok(rate) if rate <= 1_000_000 => Ok(PerSecond(rate)),
            _ => Err(Refusal::new(
                format!("{number} is no usable rate of connections"),
                format!("give {}", Self::EXPECTED),
            )),
        }
    }
}

scalar_schema!(
    PerSecond,
    json_schema!({"type": "integer", "minimum": 0, "maximum": 1_000_000})
);

/// A range of vsock ports, `A-B`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortRange(pub(super) RangeInclusive<u32>);

impl Text for PortRange {
    const EXPECTED: &'static str = "a range of vsock ports such as 8000-8099";

    fn parse(text: &str) -> Result<PortRange, Refusal> {
        let port = |text: &str| -> Result<u32, Refusal> {
            let number = digits(text).ok_or_else(|| {
                Refusal::new(
                    format!("{} is no range of ports", quoted(text)),
                    format!("give {}", Self::EXPECTED),
                )
            })?;
            GuestPort::from_number(number).map(|port| port.0)
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = match (port(first), port(last)) {
            (Ok(first), Ok(last)) => (first, last),
            // The whole text reads better than the half of it that was not understood.
            (Err(refusal), _) | (_, Err(refusal)) if digits(first).is_some() && digits(last).is_some() => {
                return Err(refusal);
            }
            _ => {
                let message = format!("{} is no range of ports", quoted(text));
                return Err(Refusal::new(message, format!("give {}", Self::EXPECTED)));
            }
        };
        if !text.contains('-') {
            return Err(Refusal::new(
                format!("{first} is one port, not a range"),
                format!(
                    "write `port: {first}`, or a range such as {first}-{}",
                    first.saturating_add(99)
                ),
            ));
        }
        if first > last {
            return Err(Refusal::new(
                format!("the range {} ends before it begins", quoted(text)),
                format!("write {last}-{first}"),
            ));
        }
        Ok(PortRange(first..=last))
    }

    fn parse_number(number: u64) -> Result<PortRange, Refusal> {
        PortRange::parse(&number.to_string())
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}

scalar_schema!(
    PortRange,
    json_schema!({"type": "string", "pattern": "^[1-9][0-9]{0,9}-[1-9][0-9]{0,9}$"})
);

/// A length of time: a whole number and its unit.
///
/// Called a period because `Duration` is what it becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Period(pub(super) Duration);

impl Period {
    pub(super) const fn from_millis(millis: u64) -> Period {
        Period(Duration::from_millis(millis))
    }
}

impl Text for Period {
    const EXPECTED: &'static str = "a whole number with the unit us, ms, s, m or h, such as 500ms or 5s";

    fn parse(text: &str) -> Result<Period, Refusal> {
        let refusal = || {
            Refusal::new(
                format!("{} is no duration", quoted(text)),
                format!("give {}", Self::EXPECTED),
            )
        };
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| {
            Refusal::new(
                format!("{} lacks a unit", quoted(text)),
                format!("write {text}s for seconds, {text}ms for milliseconds"),
            )
        })?;
        let (number, unit) = text.split_at(unit_at);
        let number = digits(number).ok_or_else(refusal)?;
        let micros = match unit {
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "m" => 60_000_000,
            "h" => 3_600_000_000,
            _ => return Err(refusal()),
        };
        number
            .checked_mul(micros)
            .map(|micros| Period(Duration::from_micros(micros)))
            .ok_or_else(refusal)
    }

    fn parse_number(number: u64) -> Result<Period, Refusal> {
        Period::parse(&number.to_string())
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        let units = [
            (3_600_000_000, "h"),
            (60_000_000, "m"),
            (1_000_000, "s"),
            (1_000, "ms"),
        ];
        match units
            .iter()
            .find(|(unit, _)| micros > 0 && micros.is_multiple_of(*unit))
        {
            Some((unit, name)) => write!(f, "{}{name}", micros / unit),
            None if micros == 0 => f.write_str("0s"),
            None => write!(f, "{micros}us"),
        }
    }
}

scalar_schema!(
    Period,
    json_schema!({"type": "string", "pattern": "^(0|[1-9][0-9]{0,18})(us|ms|s|m|h)$"})
);

/// A number of bytes: a whole number, with or without a binary unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ByteSize(pub(super) u64);

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_text(deserializer)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Without a unit it is a number, and a number in quotes is refused.
        if self.0.is_multiple_of(1024) {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl Text for ByteSize {
    const EXPECTED: &'static str = "a size such as 256KiB or 1MiB, or a plain number of bytes";

    fn parse(text: &str) -> Result<ByteSize, Refusal> {
        let refusal = |help: String| Refusal::new(format!("{} is no size", quoted(text)), help);
        let expected = || format!("give {}", Self::EXPECTED);
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let number = digits(number).ok_or_else(|| refusal(expected()))?;
        let shift = match unit {
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            _ => {
                let meant = match unit.trim().to_ascii_lowercase().as_str() {
                    "k" | "kb" | "ki" | "kib" => "KiB",
                    "m" | "mb" | "mi" | "mib" => "MiB",
                    "g" | "gb" | "gi" | "gib" => "GiB",
                    "" => {
                        return Err(refusal(format!(
                            "write {number} without quotes for bytes, or add KiB or MiB"
                        )));
                    }
                    _ => return Err(refusal(expected())),
                };
                return Err(refusal(format!(
                    "did you mean {number}{meant}? Units are KiB, MiB and GiB"
                )));
            }
        };
        number
            .checked_mul(1 << shift)
            .map(ByteSize)
            .ok_or_else(|| refusal(expected()))
    }

    fn parse_number(number: u64) -> Result<ByteSize, Refusal> {
        Ok(ByteSize(number))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB")];
        match units.iter().find(|(unit, _)| self.0.is_multiple_of(*unit)) {
            Some((unit, name)) if self.0 > 0 => write!(f, "{}{name}", self.0 / unit),
            _ if self.0.is_multiple_of(1024) => write!(f, "{}KiB", self.0 / 1024),
            _ => write!(f, "{}", self.0),
        }
    }
}

scalar_schema!(
    ByteSize,
    json_schema!({"anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": "^(0|[1-9][0-9]{0,18})(KiB|MiB|GiB)$"},
    ]})
);

/// A level, or a list of levels by module: `info`, `info,vsock_sidecar::device=debug`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogLevel(pub(super) String);

impl LogLevel {
    const LEVELS: [&'static str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
}

impl Text for LogLevel {
    const EXPECTED: &'static str =
        "off, error, warn, info, debug or trace, or a list such as info,vsock_sidecar::device=debug";

    // Stricter than tracing's own parser, to which a mistyped level is the name of a module whose everything is
    // wanted.
    fn parse(text: &str) -> Result<LogLevel, Refusal> {
        let fits = |part: &str| {
            let (module, level) = part.split_once('=').unwrap_or(("all", part));
            let module_fits = !module.is_empty()
                && module
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
            module_fits && LogLevel::LEVELS.contains(&level)
        };
        match text.split(',').find(|part| !fits(part)) {
            None => Ok(LogLevel(text.to_owned())),
            Some(part) => {
                let help = match super::diagnostic::did_you_mean(part, &LogLevel::LEVELS) {
                    Some(meant) => format!("did you mean `{meant}`? Give {}", Self::EXPECTED),
                    None => format!("give {}", Self::EXPECTED),
                };
                Err(Refusal::new(format!("{} is no log level", quoted(part)), help))
            }
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

scalar_schema!(
    LogLevel,
    json_schema!({
        "type": "string",
        "pattern": "^([A-Za-z0-9_:]+=)?(off|error|warn|info|debug|trace)(,([A-Za-z0-9_:]+=)?(off|error|warn|info|debug|trace))*$",
    })
);

/// The number that `text` is, if it is nothing but a few digits. A leading zero is refused: some readers take what
/// follows it as octal.
pub(super) fn digits(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.len() <= 19 && text.bytes().all(|b| b.is_ascii_digit());
    if !is_number || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_printed_in_their_largest_unit() {
        for (text, millis, printed) in [
            ("500ms", 500, "500ms"),
            ("1500ms", 1_500, "1500ms"),
            ("5000ms", 5_000, "5s"),
            ("60s", 60_000, "1m"),
            ("90s", 90_000, "90s"),
            ("120m", 7_200_000, "2h"),
            ("0h", 0, "0s"),
        ] {
            let period = Period::parse(text)
                .map_err(|refusal| refusal.message)
                .expect(text);
            assert_eq!(
                (period, period.to_string().as_str()),
                (Period::from_millis(millis), printed),
                "{text}"
            );
        }
        for text in [
            "",
            "s",
            "-1s",
            "1.5s",
            "5 s",
            "05s",
            "5S",
            "5sec",
            "1h30m",
            "18446744073709551615h",
        ] {
            assert!(Period::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes, printed) in [
            ("4KiB", 4096, "4KiB"),
            ("1024KiB", 1 << 20, "1MiB"),
            ("1GiB", 1 << 30, "1GiB"),
            ("1536KiB", 1_572_864, "1536KiB"),
        ] {
            let size = ByteSize::parse(text)
                .map_err(|refusal| refusal.message)
                .expect(text);
            assert_eq!((size.0, size.to_string().as_str()), (bytes, printed), "{text}");
        }
        for text in [
            "",
            "KiB",
            "1KB",
            "1 KiB",
            "1kib",
            "-1KiB",
            "01KiB",
            "4096",
            "99999999999GiB",
        ] {
            assert!(ByteSize::parse(text).is_err(), "{text}");
        }
    }
}
