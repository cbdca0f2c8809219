//! Which rule a destination of a guest belongs to.

use crate::config::OutboundRule;
use crate::vsock::Cid;

/// The outbound rules of one guest, first match wins.
#[derive(Clone, Debug)]
pub struct Router {
    rules: Vec<OutboundRule>,
}

impl Router {
    /// A router over rules in the order of the configuration.
    pub fn new(rules: Vec<OutboundRule>) -> Router {
        Router { rules }
    }

    /// The connections that each rule may have at once, in their order.
    pub(super) fn limits(&self) -> Vec<Option<usize>> {
        self.rules.iter().map(|rule| rule.connections).collect()
    }

    /// The rule for an address and its position.
    pub fn route(&self, cid: Cid, port: u32) -> Option<(usize, &OutboundRule)> {
        self.rules
            .iter()
            .enumerate()
            .find(|(_, rule)| Cid(u64::from(rule.cid)) == cid && rule.ports.contains(&port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Target;

    #[test]
    fn the_first_match_wins() {
        let rule = |ports, port| OutboundRule {
            name: String::new(),
            cid: 2,
            ports,
            target: Target::Tcp {
                host: "h".into(),
                port,
            },
            proxy_protocol: None,
            framing: None,
            connections: None,
        };
        let router = Router::new(vec![rule(10..=10, 1), rule(5..=20, 100)]);
        let route = |cid, port| router.route(cid, port).map(|(i, _)| i);
        assert_eq!(route(Cid::HOST, 10), Some(0));
        assert_eq!(route(Cid::HOST, 11), Some(1));
        assert_eq!(route(Cid::HOST, 21), None);
        assert_eq!(route(Cid(3), 10), None, "another guest's port");
        // The upper 32 bits are reserved: they make it another address, not this one.
        assert_eq!(route(Cid(2 | 1 << 32), 10), None);
    }
}
