//! Which TCP listeners cannot be bound beside each other.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::document::NodeId;

/// TCP addresses that are listened on, and which of them cannot be bound together.
///
/// A wildcard takes its port on every address of its family, and `[::]` takes it for IPv4 as well, as Linux has it
/// unless IPV6_V6ONLY is set.
#[derive(Default)]
pub(super) struct TcpListeners {
    exact: HashMap<SocketAddr, (SocketAddr, NodeId)>,
    /// The first listener of each family on a port: IPv4, IPv6.
    by_port: HashMap<u16, [Option<(SocketAddr, NodeId)>; 2]>,
    wildcards: HashMap<u16, [Option<(SocketAddr, NodeId)>; 2]>,
}

impl TcpListeners {
    /// Adds a listener; the one it conflicts with, if any.
    pub(super) fn insert(&mut self, address: SocketAddr, at: NodeId) -> Option<(SocketAddr, NodeId)> {
        // ::ffff:127.0.0.1 is bound as 127.0.0.1.
        let ip = address.ip().to_canonical();
        let canonical = SocketAddr::new(ip, address.port());
        let is_wildcard = ip.is_unspecified();
        let family = usize::from(ip.is_ipv6());
        let takes_both = is_wildcard && ip.is_ipv6();

        let [wild_v4, wild_v6] = self.wildcards.get(&address.port()).copied().unwrap_or_default();
        let [any_v4, any_v6] = self.by_port.get(&address.port()).copied().unwrap_or_default();
        let conflict = self.exact.get(&canonical).copied().or(match ip {
            _ if takes_both => any_v4.or(any_v6),
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => any_v4.or(wild_v6),
            IpAddr::V4(_) => wild_v4.or(wild_v6),
            IpAddr::V6(_) => wild_v6,
        });
        let entry = (address, at);
        self.exact.entry(canonical).or_insert(entry);
        let slot = |map: &mut HashMap<u16, [Option<(SocketAddr, NodeId)>; 2]>| {
            if let Some(first) = map.entry(address.port()).or_default().get_mut(family) {
                first.get_or_insert(entry);
            }
        };
        slot(&mut self.by_port);
        if is_wildcard {
            slot(&mut self.wildcards);
        }
        conflict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::document::Document;

    /// Which listeners cannot stand beside each other, asked in both orders.
    #[test]
    fn listeners_in_each_others_way() {
        let conflicting = |first: &str, second: &str| {
            let mut listeners = TcpListeners::default();
            let mut insert = |text: &str| listeners.insert(text.parse().expect("an address"), Document::ROOT);
            assert_eq!(insert(first), None);
            insert(second).is_some()
        };
        for (a, b, expected) in [
            ("127.0.0.1:1", "127.0.0.1:1", true),
            ("127.0.0.1:1", "127.0.0.1:2", false),
            ("127.0.0.1:1", "127.0.0.2:1", false),
            ("0.0.0.0:1", "127.0.0.1:1", true),
            ("0.0.0.0:1", "[::1]:1", false),
            ("[::]:1", "[::1]:1", true),
            ("[::]:1", "127.0.0.1:1", true),
            ("[::]:1", "0.0.0.0:1", true),
            ("[::1]:1", "127.0.0.1:1", false),
            ("[::ffff:127.0.0.1]:1", "127.0.0.1:1", true),
        ] {
            assert_eq!(conflicting(a, b), expected, "{a} then {b}");
            assert_eq!(conflicting(b, a), expected, "{b} then {a}");
        }
    }
}
