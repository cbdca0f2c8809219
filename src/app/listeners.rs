//! The listeners of inbound rules. A reload keeps those whose address stays, whatever else becomes of their rules: clients in their
//! queues wait for nobody but the next turn.

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
    /// Binds what is new. On an error it is as before.
    pub(super) fn plan(&self, guests: &[Guest]) -> Result<Plan, Error> {
        let mut plan = Plan { entries: Vec::new() };
        let mut kept = vec![false; self.running.len()];
        for guest in guests {
            for rule in &guest.inbound {
                let place = Place::of(rule);
                let owner = (guest.name.clone(), rule.name.clone());
                // Two rules may have port 0: then each keeps its own.
                let free = |index: &usize| {
                    !kept.get(*index).copied().unwrap_or(true)
                        && self.running.get(*index).is_some_and(|own| own.place == place)
                };
                let mut candidates = (0..self.running.len()).filter(free);
                let same = candidates
                    .clone()
                    .find(|index| self.running.get(*index).is_some_and(|own| own.owner == owner));
                let how = match same.or_else(|| candidates.next()) {
                    Some(index) => {
                        if let Some(kept) = kept.get_mut(index) {
                            *kept = true;
                        }
                        How::Keep(index)
                    }
                    None => How::New(self.bind(rule, &owner)?),
                };
                plan.entries.push(Entry { place, owner, how });
            }
        }
        Ok(plan)
    }

    fn bind(&self, rule: &InboundRule, owner: &Owner) -> Result<Listener, Error> {
        Listener::bind(&rule.listen, rule.socket_type).map_err(|source| Error::Listen {
            guest: owner.0.clone(),
            rule: owner.1.clone(),
            source: Box::new(source),
            held: self.in_the_way(&rule.listen),
        })
    }

    /// A listener of our own that takes what `address` asks for.
    fn in_the_way(&self, address: &ListenAddress) -> Option<String> {
        let holder = self
            .running
            .iter()
            .find(|own| match (&own.place.address, address) {
                (ListenAddress::Tcp(ours), ListenAddress::Tcp(theirs)) => {
                    let wild = ours.ip().is_unspecified() || theirs.ip().is_unspecified();
                    ours.port() == theirs.port() && (wild || ours.ip() == theirs.ip())
                }
                (ours, theirs) => ours == theirs,
            })?;
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

/// Ends listeners, and waits for that: the next reload may want the addresses again.
fn close(listeners: impl Iterator<Item = Running>, control: &Handle) {
    let closing: Vec<_> = listeners
        .map(|running| {
            drop(running.stop);
            (running.owner, running.task)
        })
        .collect();
    for ((guest, rule), task) in closing {
        let closed = control.block_on(async { tokio::time::timeout(CLOSING, task).await });
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
            "an inbound listener has failed, and takes no clients until the sidecar is started again"
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
