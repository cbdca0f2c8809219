//! Which listeners cannot be bound beside each other.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::document::NodeId;

/// TCP addresses that are listened on, and which of them cannot be bound together.
///
/// A wildcard takes its port on every address of its family. What `[::]` takes is told with it: inbound rules bind it for
/// IPv6 alone (IPV6_V6ONLY, src/host/listen.rs), the admin server for IPv4 as well unless it has an IPv4 listener of its own
/// on that port (src/admin/listen.rs).
#[derive(Default)]
pub(super) struct TcpListeners {
    exact: HashMap<SocketAddr, (SocketAddr, NodeId)>,
    /// The first listener of each family on a port: IPv4, IPv6.
    by_port: HashMap<u16, [Option<(SocketAddr, NodeId)>; 2]>,
    /// The first wildcard that takes the port of a family, which may be of the other.
    wildcards: HashMap<u16, [Option<(SocketAddr, NodeId)>; 2]>,
}

/// What `[::]` takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Families {
    /// IPv6 alone.
    Own,
    /// IPv4 too.
    Both,
}

const IPV4: usize = 0;
const IPV6: usize = 1;

impl TcpListeners {
    /// Adds a listener; the one it conflicts with, if any. `families` matters to `[::]` only.
    pub(super) fn insert(
        &mut self,
        address: SocketAddr,
        families: Families,
        at: NodeId,
    ) -> Option<(SocketAddr, NodeId)> {
        let port = address.port();
        let is_wildcard = address.ip().is_unspecified();
        let takes_both = is_wildcard && address.is_ipv6() && families == Families::Both;

        let [wild_v4, wild_v6] = self.wildcards.get(&port).copied().unwrap_or_default();
        let [any_v4, any_v6] = self.by_port.get(&port).copied().unwrap_or_default();
        let conflict = self.exact.get(&address).copied().or(match address.ip() {
            _ if takes_both => any_v4.or(any_v6),
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => any_v4.or(wild_v4),
            IpAddr::V4(_) => wild_v4,
            IpAddr::V6(_) if is_wildcard => any_v6,
            IpAddr::V6(_) => wild_v6,
        });
        let entry = (address, at);
        self.exact.entry(address).or_insert(entry);
        let own = if address.is_ipv6() { IPV6 } else { IPV4 };
        let slot = |map: &mut HashMap<u16, [Option<(SocketAddr, NodeId)>; 2]>, family: usize| {
            if let Some(first) = map.entry(port).or_default().get_mut(family) {
                first.get_or_insert(entry);
            }
        };
        slot(&mut self.by_port, own);
        if is_wildcard {
            slot(&mut self.wildcards, own);
        }
        if takes_both {
            slot(&mut self.wildcards, IPV4);
        }
        conflict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::document::Document;

    /// Which listeners cannot stand beside each other, asked in both orders: with `[::]` as an inbound rule binds it, and
    /// as the admin server does.
    #[test]
    fn listeners_in_each_others_way() {
        let conflicting = |first: &str, second: &str, families: Families| {
            let mut listeners = TcpListeners::default();
            let mut insert = |text: &str| {
                let address = text.parse().expect("an address");
                listeners.insert(address, families, Document::ROOT)
            };
            assert_eq!(insert(first), None);
            insert(second).is_some()
        };
        for (a, b, inbound, admin) in [
            ("127.0.0.1:1", "127.0.0.1:1", true, true),
            ("127.0.0.1:1", "127.0.0.1:2", false, false),
            ("127.0.0.1:1", "127.0.0.2:1", false, false),
            ("0.0.0.0:1", "127.0.0.1:1", true, true),
            ("0.0.0.0:1", "[::1]:1", false, false),
            ("[::]:1", "[::1]:1", true, true),
            ("[::]:1", "[::]:1", true, true),
            ("[::]:1", "127.0.0.1:1", false, true),
            ("[::]:1", "0.0.0.0:1", false, true),
            ("[::1]:1", "127.0.0.1:1", false, false),
        ] {
            for (families, expected) in [(Families::Own, inbound), (Families::Both, admin)] {
                assert_eq!(
                    conflicting(a, b, families),
                    expected,
                    "{a} then {b}, {families:?}"
                );
                assert_eq!(
                    conflicting(b, a, families),
                    expected,
                    "{b} then {a}, {families:?}"
                );
            }
        }
    }
}
