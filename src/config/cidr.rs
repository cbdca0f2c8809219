//! Ranges of IP addresses, in the notation of RFC 4632 and RFC 4291: `10.0.0.0/8`, `2001:db8::/32`, or one address.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Deserializer;
use serde::{Deserialize, Serialize, Serializer};

use super::ListenAddress;
use super::diagnostic::quoted;
use super::given::Refusal;
use super::schema::MAX_ALLOWED;
use super::values::{Text, digits, scalar_schema, text_serde};

/// A range of IP addresses.
///
/// `::ffff:a.b.c.d` stands for the IPv4 address in it, in the range as in the address that is held against it: it is how a
/// socket of both families shows an IPv4 peer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Cidr {
    /// The first address; never an IPv6 address that stands for an IPv4 one.
    network: IpAddr,
    /// How many leading bits all addresses of the range share; at most [`width`].
    prefix: u8,
}

impl Cidr {
    /// The addresses that share the first `prefix` bits of `network`. `None` when it has fewer bits, or others set.
    pub fn new(network: IpAddr, prefix: u8) -> Option<Cidr> {
        let canonical = network.to_canonical();
        let prefix = prefix.checked_sub(width(network) - width(canonical))?;
        let in_range = prefix <= width(canonical) && bits(canonical) & host_mask(canonical, prefix) == 0;
        in_range.then_some(Cidr {
            network: canonical,
            prefix,
        })
    }

    /// Whether an address is in the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let differing = bits(address) ^ bits(self.network);
        address.is_ipv4() == self.network.is_ipv4() && differing & !host_mask(address, self.prefix) == 0
    }

    /// Whether its addresses are IPv4's.
    pub fn is_ipv4(&self) -> bool {
        self.network.is_ipv4()
    }
}

impl Cidr {
    /// Refuses a list of ranges that cannot be meant for the clients of a listener.
    pub(super) fn check_list(ranges: &[Cidr], listen: &ListenAddress) -> Result<(), Refusal> {
        let listen = match listen {
            ListenAddress::Tcp(listen) => listen,
            ListenAddress::Vsock(_) => {
                return Err(Refusal::new(
                    "clients of AF_VSOCK have no IP addresses to allow",
                    "remove `allow`; to choose the clients, listen on TCP",
                ));
            }
            ListenAddress::Unix(_) => {
                return Err(Refusal::new(
                    "clients of a unix socket have no IP addresses to allow",
                    "remove `allow`: who may connect is a matter of the permissions of the socket (owner and group, 0660) and \
                     of its directory",
                ));
            }
        };
        if ranges.is_empty() {
            return Err(Refusal::new(
                "with nobody allowed the listener has no use",
                "name who may connect, such as `allow: [10.0.0.0/8]`, or remove the key to let everyone in",
            ));
        }
        if ranges.len() > MAX_ALLOWED {
            return Err(Refusal::new(
                format!("{} ranges are more than {MAX_ALLOWED}", ranges.len()),
                "join ranges to larger ones",
            ));
        }
        let is_ipv4 = listen.ip().to_canonical().is_ipv4();
        // `[::]` takes no IPv4 clients either: src/host/listen.rs sets IPV6_V6ONLY.
        if ranges.iter().all(|range| range.is_ipv4() != is_ipv4) {
            let (own, other) = if is_ipv4 {
                ("IPv4", "IPv6")
            } else {
                ("IPv6", "IPv4")
            };
            return Err(Refusal::new(
                format!("only {other} addresses are allowed, and tcp://{listen} takes {own} clients"),
                format!("add ranges of {own} addresses, or listen on an {other} address"),
            ));
        }
        Ok(())
    }
}

/// Bits of an address.
fn width(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// An address as a number, right-aligned.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The bits behind the prefix.
fn host_mask(address: IpAddr, prefix: u8) -> u128 {
    let host_bits = width(address).saturating_sub(prefix);
    // A shift by all 128 bits has no meaning of its own.
    1u128
        .checked_shl(host_bits.into())
        .map_or(u128::MAX, |bit| bit - 1)
}

text_serde!(Cidr);

impl Text for Cidr {
    const EXPECTED: &'static str =
        "a range of IP addresses such as 10.0.0.0/8 or fd00::/8, or one address such as 192.0.2.7";

    fn parse(text: &str) -> Result<Cidr, Refusal> {
        let no_range = || {
            Refusal::new(
                format!("{} is no range of IP addresses", quoted(text)),
                format!("give {}", Self::EXPECTED),
            )
        };
        let (network, prefix) = match text.split_once('/') {
            Some((network, prefix)) => (network, Some(prefix)),
            None => (text, None),
        };
        let network: IpAddr = network.parse().map_err(|_| no_range())?;
        let most = width(network);
        let prefix = match prefix {
            None => most,
            Some(prefix) => match digits(prefix).map(u8::try_from).ok_or_else(no_range)? {
                Ok(prefix) if prefix <= most => prefix,
                _ => {
                    let family = if network.is_ipv4() { "IPv4" } else { "IPv6" };
                    return Err(Refusal::new(
                        format!("an {family} address has no prefix of {prefix} bits"),
                        format!("give a prefix from 0 to {most}"),
                    ));
                }
            },
        };
        Cidr::new(network, prefix).ok_or_else(|| {
            // Rather refused than cut: who writes 10.1.2.3/8 may have meant the one address as well.
            let first = bits(network) & !host_mask(network, prefix);
            let first = match network {
                IpAddr::V4(_) => IpAddr::V4(u32::try_from(first).unwrap_or_default().into()),
                IpAddr::V6(_) => IpAddr::V6(first.into()),
            };
            Refusal::new(
                format!("{} has bits set behind its prefix", quoted(text)),
                format!("write {first}/{prefix} for the range, or {network} for the one address"),
            )
        })
    }
}

impl fmt::Display for Cidr {
    /// The form that the configuration has; a range of one address is that address.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == width(self.network) {
            true => write!(f, "{}", self.network),
            false => write!(f, "{}/{}", self.network, self.prefix),
        }
    }
}

scalar_schema!(
    Cidr,
    json_schema!({
        "type": "string",
        "pattern": r"^([0-9]{1,3}(\.[0-9]{1,3}){3}(/([12]?[0-9]|3[0-2]))?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(/[0-9]{1,3})?)$",
    })
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cidr(text: &str) -> Cidr {
        Cidr::parse(text)
            .map_err(|refusal| refusal.to_string())
            .unwrap_or_else(|refusal| panic!("{text}: {refusal}"))
    }

    #[test]
    fn who_is_in_a_range_and_who_is_not() {
        for (range, inside, outside) in [
            ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
            ("10.0.0.0/8", "::ffff:10.1.2.3", "::ffff:11.1.2.3"),
            ("::ffff:10.0.0.0/104", "10.1.2.3", "::10.1.2.3"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("192.0.2.6/31", "192.0.2.7", "192.0.2.8"),
            ("0.0.0.0/0", "255.255.255.255", "::1"),
            ("::/0", "2001:db8::1", "10.0.0.1"),
            ("::/0", "::", "::ffff:10.0.0.1"),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("2001:db8::1", "2001:db8::1", "2001:db8::2"),
            ("::/96", "::10.0.0.1", "10.0.0.1"),
        ] {
            assert!(cidr(range).contains(inside.parse().unwrap()), "{range} {inside}");
            assert!(
                !cidr(range).contains(outside.parse().unwrap()),
                "{range} {outside}"
            );
        }
    }

    #[test]
    fn ranges_are_printed_as_one_writes_them() {
        for (text, printed) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("192.0.2.7/32", "192.0.2.7"),
            ("FD00:0::/8", "fd00::/8"),
            ("::1/128", "::1"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
        ] {
            assert_eq!(cidr(text).to_string(), printed);
        }
    }

    #[test]
    fn what_is_no_range_says_what_would_be() {
        for (text, help) in [
            (
                "10.0.0.1/8",
                "write 10.0.0.0/8 for the range, or 10.0.0.1 for the one address",
            ),
            ("fd00::1/8", "write fd00::/8 for the range"),
            // All of IPv4, and some that is not: which of them was meant?
            ("::ffff:10.0.0.0/8", "write ::/8 for the range"),
            ("10.0.0.0/33", "from 0 to 32"),
            ("10.0.0.0/999", "from 0 to 32"),
            ("fd00::/129", "from 0 to 128"),
            ("10.0.0.0/08", "such as 10.0.0.0/8"),
            ("10.0.0.0/", "such as 10.0.0.0/8"),
            ("10.0.0.0/255.0.0.0", "such as 10.0.0.0/8"),
            ("10/8", "such as 10.0.0.0/8"),
            ("010.0.0.0/8", "such as 10.0.0.0/8"),
            ("10.0.0.1:22", "such as 10.0.0.0/8"),
            ("[::1]", "such as 10.0.0.0/8"),
            ("fe80::1%eth0", "such as 10.0.0.0/8"),
            ("localhost", "such as 10.0.0.0/8"),
            ("", "such as 10.0.0.0/8"),
        ] {
            let refusal = Cidr::parse(text).err().unwrap_or_else(|| panic!("{text}"));
            assert!(refusal.help.contains(help), "{text}: {}", refusal.help);
        }
    }

    #[test]
    fn a_list_fits_its_listener_or_says_what_would() {
        let judged = |ranges: &[Cidr], listen: &str| {
            let listen = ListenAddress::parse(listen).map_err(|refusal| refusal.to_string());
            Cidr::check_list(ranges, &listen.expect("an address"))
                .err()
                .map(|refusal| refusal.message)
        };
        let (v4, v6) = (cidr("10.0.0.0/8"), cidr("fd00::/8"));
        for (ranges, listen, says) in [
            (vec![v4], "tcp://127.0.0.1:1", None),
            (vec![v6, v4], "tcp://127.0.0.1:1", None),
            (vec![v6, v4], "tcp://[::1]:1", None),
            (vec![v4], "tcp://[::]:1", Some("only IPv4 addresses are allowed")),
            (vec![v6], "tcp://[::]:1", None),
            (vec![v4; MAX_ALLOWED], "tcp://0.0.0.0:1", None),
            (
                vec![v4; MAX_ALLOWED + 1],
                "tcp://0.0.0.0:1",
                Some("257 ranges are more than 256"),
            ),
            (
                vec![v6],
                "tcp://0.0.0.0:1",
                Some("only IPv6 addresses are allowed"),
            ),
            (vec![v4], "tcp://[::1]:1", Some("only IPv4 addresses are allowed")),
            (vec![], "tcp://127.0.0.1:1", Some("nobody allowed")),
            (vec![v4], "unix:///a", Some("no IP addresses")),
            (vec![v4], "vsock://1", Some("no IP addresses")),
        ] {
            let said = judged(&ranges, listen);
            assert_eq!(said.is_some(), says.is_some(), "{listen}: {said:?}");
            assert!(
                said.unwrap_or_default().contains(says.unwrap_or_default()),
                "{listen}"
            );
        }
    }

    proptest! {
        /// Judged bit by bit, and what is printed is read as the same.
        #[test]
        fn a_range_shares_its_first_bits(
            address: IpAddr, other: IpAddr, prefix in 0..=128u8, flip in prop::option::of(0..128u8),
        ) {
            let address = address.to_canonical();
            let prefix = prefix.min(width(address));
            let network = bits(address) & !host_mask(address, prefix);
            let make = |bits: u128| match address {
                IpAddr::V4(_) => IpAddr::V4((bits as u32).into()),
                IpAddr::V6(_) => IpAddr::V6(bits.into()),
            };
            let network = make(network);
            prop_assume!(network == network.to_canonical());
            let range = Cidr::new(network, prefix).expect("its host bits are zero");
            prop_assert!(range.contains(address));
            prop_assert_eq!(cidr(&range.to_string()), range);
            // An address of the same family that differs in one bit, or any.
            let other = match flip {
                Some(bit) => make(bits(address) ^ (1 << (bit % width(address)))),
                None => other,
            }.to_canonical();
            let shared = (bits(other) ^ bits(network)) << (128 - u32::from(width(address)));
            let expected = other.is_ipv4() == network.is_ipv4() && shared.leading_zeros() >= prefix.into();
            prop_assert_eq!(range.contains(other), expected, "{} {}", range, other);
        }
    }
}
