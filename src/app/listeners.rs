//! The listeners of inbound rules. A reload keeps those whose address stays, whatever else becomes of their rules: clients in their
//! queues wait for nobody but the next turn.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tracing::{debug, error, warn};

use super::Error;
use super::guests::RunningGuest;
use crate::config::{Guest, InboundRule, ListenAddress, SocketType};
use crate::device::{Command, DeviceHandle, Rule};
use crate::drain;
use crate::host::listen::{InboundSpec, Incoming, Listener, Rejected, Rejection, Terms};
use crate::quota::Pool;
use crate::sys::unwind;
use crate::vsock::RefuseReason;

/// How long a listener may take to close: it has to be scheduled, and to drop what it holds.
const CLOSING: Duration = Duration::from_secs(2);

/// What makes a socket of ours another one.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    address: ListenAddress,
    /// Of a unix socket.
    socket_type: Option<SocketType>,
}

impl Place {
    fn of(rule: &InboundRule) -> Place {
        Place {
            address: rule.listen.clone(),
            socket_type: matches!(rule.listen, ListenAddress::Unix(_)).then_some(rule.socket_type),
        }
    }
}

/// Whose a listener is: names of guest and rule.
type Owner = (String, String);

/// A listener that is served.
struct Running {
    place: Place,
    owner: Owner,
    /// Where it really listens: the kernel may have chosen the port.
    bound: ListenAddress,
    terms: watch::Sender<Arc<Terms>>,
    /// Dropped to end it.
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// All that are served.
#[derive(Default)]
pub(super) struct Listeners {
    running: Vec<Running>,
}

/// How a configuration's listeners are come by: everything that can be refused is done.
pub(super) struct Plan {
    entries: Vec<Entry>,
}

struct Entry {
    place: Place,
    owner: Owner,
    how: How,
}

enum How {
    /// The one at this position of those that run.
    Keep(usize),
    /// One that is bound and not served yet.
    New(Listener),
}

impl Listeners {
    /// Binds what is new; `admin` is where the admin server listens. On an error it is as before.
    pub(super) fn plan(&self, guests: &[Guest], admin: &[ListenAddress]) -> Result<Plan, Error> {
        let rules = guests.iter().flat_map(|guest| {
            let owner = move |rule: &InboundRule| (guest.name.clone(), rule.name.clone());
            let rules = guest.inbound.iter();
            rules.map(move |rule| (rule, Place::of(rule), owner(rule)))
        });
        let rules: Vec<_> = rules.collect();
        let mut free: HashMap<&ListenAddress, Vec<usize>> = HashMap::new();
        for (index, running) in self.running.iter().enumerate() {
            // One whose task has ended listens no more.
            if !running.task.is_finished() {
                free.entry(&running.place.address).or_default().push(index);
            }
        }
        // Two rules may have port 0: then each keeps its own, before others take what is left.
        let mut kept: HashMap<Owner, usize> = HashMap::new();
        for by_owner in [true, false] {
            for (_, place, owner) in &rules {
                let is_it = |index: &usize| {
                    let own = self.running.get(*index);
                    own.is_some_and(|own| own.place == *place && (!by_owner || own.owner == *owner))
                };
                if !kept.contains_key(owner)
                    && let Some(there) = free.get_mut(&place.address)
                    && let Some(at) = there.iter().position(is_it)
                {
                    kept.insert(owner.clone(), there.remove(at));
                }
            }
        }
        let entry = |(rule, place, owner): (&InboundRule, Place, Owner)| {
            let how = match kept.get(&owner) {
                Some(index) => How::Keep(*index),
                None => How::New(self.bind(rule, &owner, admin)?),
            };
            Ok(Entry { place, owner, how })
        };
        let entries = rules.into_iter().map(entry).collect::<Result<_, Error>>()?;
        Ok(Plan { entries })
    }

    fn bind(&self, rule: &InboundRule, owner: &Owner, admin: &[ListenAddress]) -> Result<Listener, Error> {
        Listener::bind(&rule.listen, rule.socket_type).map_err(|source| Error::Listen {
            guest: owner.0.clone(),
            rule: owner.1.clone(),
            source: Box::new(source),
            held: self.in_the_way(&rule.listen, admin),
        })
    }

    /// A listener of our own that takes what `address` asks for.
    fn in_the_way(&self, address: &ListenAddress, admin: &[ListenAddress]) -> Option<String> {
        if admin.iter().any(|ours| overlaps(ours, address)) {
            return Some(
                "it is this sidecar's admin server that listens there, and moves with a restart only: choose another address".to_owned(),
            );
        }
        let holder = self
            .running
            .iter()
            .find(|own| overlaps(&own.place.address, address))?;
        let (guest, rule) = &holder.owner;
        Some(format!(
            "it is this sidecar that listens there, for guest {guest}, inbound rule {rule}: a listener cannot be replaced by one \
             that overlaps with it within one reload; remove the rule, reload, and add the new one"
        ))
    }

    /// Serves what is planned, on its present terms, and closes the rest.
    pub(super) fn carry_out(
        &mut self,
        plan: Plan,
        guests: &[RunningGuest],
        control: &Handle,
        descriptors: &Arc<Pool>,
        drain: &drain::Watch,
    ) {
        let mut before: Vec<Option<Running>> = self.running.drain(..).map(Some).collect();
        for Entry { place, owner, how } in plan.entries {
            let Some(terms) = terms(guests, &owner) else {
                continue;
            };
            let running = match how {
                How::Keep(index) => before.get_mut(index).and_then(Option::take).map(|running| {
                    running.terms.send_replace(terms);
                    Running {
                        place,
                        owner,
                        ..running
                    }
                }),
                How::New(listener) => {
                    let listener = listener.within(Arc::clone(descriptors));
                    let bound = listener.address().clone();
                    let (terms, current) = watch::channel(terms);
                    let (stop, stopped) = oneshot::channel();
                    let task = control.spawn(serve(listener, current, stopped, drain.clone(), owner.clone()));
                    Some(Running {
                        place,
                        owner,
                        bound,
                        terms,
                        stop,
                        task,
                    })
                }
            };
            self.running.extend(running);
        }
        close(before.into_iter().flatten(), control);
    }

    /// Where an inbound rule listens.
    pub(super) fn address(&self, guest: &str, rule: &str) -> Option<&ListenAddress> {
        let running = self
            .running
            .iter()
            .find(|own| own.owner.0 == guest && own.owner.1 == rule)?;
        Some(&running.bound)
    }
}

/// Whether who listens on one is in the way of the other.
fn overlaps(one: &ListenAddress, other: &ListenAddress) -> bool {
    match (one, other) {
        (ListenAddress::Tcp(one), ListenAddress::Tcp(other)) => {
            let wild = one.ip().is_unspecified() || other.ip().is_unspecified();
            one.port() == other.port() && (wild || one.ip() == other.ip())
        }
        (one, other) => one == other,
    }
}

/// Ends listeners, and waits for that: the next reload may want the addresses again.
fn close(listeners: impl Iterator<Item = Running>, control: &Handle) {
    let closing: Vec<_> = listeners
        .map(|running| {
            drop(running.stop);
            (running.owner, running.task)
        })
        .collect();
    // One time for all: a drain may stand behind this reload.
    let end = tokio::time::Instant::now() + CLOSING;
    for ((guest, rule), task) in closing {
        let closed = control.block_on(async { tokio::time::timeout_at(end, task).await });
        match closed {
            Ok(_) => debug!(guest, rule, "listener closed"),
            Err(_) => warn!(guest, rule, "a listener takes long to close"),
        }
    }
}

async fn serve(
    listener: Listener,
    terms: watch::Receiver<Arc<Terms>>,
    stopped: oneshot::Receiver<()>,
    drain: drain::Watch,
    (guest, rule): Owner,
) {
    let stop = async {
        tokio::select! {
            // Nothing is sent.
            _ = stopped => {}
            () = drain.draining() => {}
        }
    };
    let mut serving = pin!(listener.serve(terms, stop));
    // The runtime would contain a panic as well, and tell nobody whose listener it was.
    let ended = poll_fn(|cx| match unwind::contain(|| serving.as_mut().poll(cx)) {
        Ok(poll) => poll.map_err(|error| error.to_string()),
        Err(panic) => Poll::Ready(Err(panic.to_string())),
    });
    if let Err(error) = ended.await {
        error!(
            guest,
            rule,
            error,
            "an inbound listener has failed, and takes no clients until the configuration changes or the sidecar is started again"
        );
    }
}

/// On which terms an inbound rule takes clients now.
fn terms(guests: &[RunningGuest], (guest, name): &Owner) -> Option<Arc<Terms>> {
    let guest = guests.iter().find(|running| running.config.name == *guest)?;
    let index = (guest.config.inbound.iter()).position(|rule| rule.name == *name)?;
    let config = guest.config.inbound.get(index)?;
    let sink = InboundSink {
        guest: guest.config.name.clone(),
        rule: Arc::clone(guest.rules.inbound(index)?),
        device: guest.device.handle.clone(),
    };
    Some(Arc::new(Terms {
        allow: config.allow.clone(),
        spec: InboundSpec {
            protocol: config.protocol,
            handshake_timeout: guest.config.limits.guest_timeout,
            wait_for_guest: config.wait_for_guest,
            socket_type: config.guest_socket_type(),
            framing: config.framing,
        },
        sink: Box::new(move |client| sink.take(client)),
    }))
}

/// Where the clients of an inbound rule go.
struct InboundSink {
    guest: String,
    rule: Arc<Rule>,
    device: DeviceHandle,
}

impl InboundSink {
    fn take(&self, client: Result<Incoming, Rejected>) {
        match client {
            Ok(incoming) => {
                let rule = Arc::clone(&self.rule);
                // A device that is gone closes the client by dropping it.
                let _ = self.device.send(Command::Incoming { rule, incoming });
            }
            Err(rejected) => {
                let reason = match rejected.why {
                    Rejection::NotAllowed => RefuseReason::Acl,
                    Rejection::NoDescriptors => RefuseReason::Descriptors,
                    _ => RefuseReason::BadHandshake,
                };
                let metrics = self.rule.metrics();
                if let Some(counter) = metrics.refused.get(reason as usize) {
                    counter.inc();
                }
                debug!(
                    guest = self.guest, rule = metrics.name, peer = rejected.peer, reason = reason.label(),
                    detail = %rejected.why, "inbound client refused"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    /// A guest with these inbound rules, each at a port that the kernel chooses, which only programs may ask for.
    fn guests(names: &[&str]) -> Vec<Guest> {
        let rule = |(n, name)| format!("{{name: {name}, listen: \"tcp://127.0.0.1:{n}\", port: 1}}");
        let rules: Vec<String> = (1..).zip(names).map(rule).collect();
        let text = format!(
            "guests: [{{name: web, cid: 3, vhostUser: {{socket: /run/web.sock}}, inbound: [{}]}}]\n",
            rules.join(", ")
        );
        let mut guests = parse(&text, "test").unwrap().0.guests;
        for rule in &mut guests[0].inbound {
            rule.listen = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
        }
        guests
    }

    /// Those of these rules, as if they were served by `task`.
    fn running(guests: &[Guest], task: impl Fn() -> JoinHandle<()>) -> Listeners {
        let guest = &guests[0];
        let running = guest.inbound.iter().map(|rule| {
            let terms = Terms {
                allow: Vec::new(),
                spec: InboundSpec {
                    protocol: rule.protocol,
                    handshake_timeout: Duration::from_secs(1),
                    wait_for_guest: false,
                    socket_type: rule.guest_socket_type(),
                    framing: rule.framing,
                },
                sink: Box::new(|_| {}),
            };
            Running {
                place: Place::of(rule),
                owner: (guest.name.clone(), rule.name.clone()),
                bound: rule.listen.clone(),
                terms: watch::channel(Arc::new(terms)).0,
                stop: oneshot::channel().0,
                task: task(),
            }
        });
        Listeners {
            running: running.collect(),
        }
    }

    fn kept(plan: &Plan) -> Vec<(&str, Option<usize>)> {
        let entries = plan.entries.iter().map(|entry| {
            let kept = match entry.how {
                How::Keep(index) => Some(index),
                How::New(_) => None,
            };
            (entry.owner.1.as_str(), kept)
        });
        entries.collect()
    }

    #[tokio::test]
    async fn each_rule_keeps_its_own_port_that_the_kernel_chose() {
        let before = guests(&["a", "b"]);
        let listeners = running(&before, || tokio::spawn(std::future::pending()));
        let after = guests(&["new", "b", "a"]);
        let plan = listeners.plan(&after, &[]).unwrap();
        assert_eq!(kept(&plan), [("new", None), ("b", Some(1)), ("a", Some(0))]);
        let renamed = guests(&["c", "b"]);
        let plan = listeners.plan(&renamed, &[]).unwrap();
        assert_eq!(kept(&plan), [("c", Some(0)), ("b", Some(1))]);
    }

    /// Its task has ended with an error, or has panicked: to keep it would be to listen no more.
    #[tokio::test]
    async fn a_listener_that_has_failed_is_bound_anew() {
        let rules = guests(&["a"]);
        let listeners = running(&rules, || tokio::spawn(async {}));
        while !listeners.running[0].task.is_finished() {
            tokio::task::yield_now().await;
        }
        let plan = listeners.plan(&rules, &[]).unwrap();
        assert_eq!(kept(&plan), [("a", None)]);
    }

    #[test]
    fn wildcards_are_in_the_way_of_every_address_of_their_port() {
        let tcp = |address: &str| ListenAddress::Tcp(address.parse().unwrap());
        for (one, other, expected) in [
            ("127.0.0.1:1", "0.0.0.0:1", true),
            ("[::]:1", "127.0.0.1:1", true),
            ("127.0.0.1:1", "127.0.0.2:1", false),
            ("127.0.0.1:1", "127.0.0.1:2", false),
        ] {
            assert_eq!(overlaps(&tcp(one), &tcp(other)), expected, "{one} {other}");
            assert_eq!(overlaps(&tcp(other), &tcp(one)), expected, "{other} {one}");
        }
    }
}
