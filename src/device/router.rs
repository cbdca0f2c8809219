//! Which rule a guest's port belongs to.

use crate::config::OutboundRule;

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

    /// The rule for a port and its position.
    pub fn route(&self, port: u32) -> Option<(usize, &OutboundRule)> {
        self.rules
            .iter()
            .enumerate()
            .find(|(_, rule)| rule.ports.contains(&port))
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
            ports,
            target: Target::Tcp {
                host: "h".into(),
                port,
            },
        };
        let router = Router::new(vec![rule(10..=10, 1), rule(5..=20, 100)]);
        assert_eq!(router.route(10).map(|(i, _)| i), Some(0));
        assert_eq!(router.route(11).map(|(i, _)| i), Some(1));
        assert_eq!(router.route(21).map(|(i, _)| i), None);
    }
}
