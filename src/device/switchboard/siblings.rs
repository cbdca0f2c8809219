//! The two ends of a connection between guests of one sidecar; see [`crate::device::sibling`].

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::Switchboard;
use crate::device::flow::{Flow, HostEnd, Room};
use crate::device::handle::Command;
use crate::device::limits;
use crate::device::messages::{Messages, Wire};
use crate::device::sibling::{Ears, SiblingAnswer, SiblingRequest};
use crate::host::HostStream;
use crate::host::dial::DialError;
use crate::vsock::{Caller, Cid, Port, RefuseReason, SocketType};

impl Switchboard {
    /// The guest wants port `to` of the guest `name`, as `flow` says.
    pub(super) fn dial_sibling(&mut self, now: Instant, mut flow: Flow, name: &str, to: u32) {
        let id = flow.id;
        let seqpacket = flow.messages.is_some();
        if seqpacket {
            flow.messages = Some(Box::new(Messages::new(Wire::SIBLING)));
        }
        let target = format!("guest://{name}:{to}");
        flow.peer.clone_from(&target);
        let rule = Arc::clone(&flow.rule);
        let guest_port = flow.guest_port;
        let (our_ears, ears) = Ears::pair();
        flow.ears = Some(our_ears);
        flow.room = Room::Awaited;
        self.flows.insert(flow);

        let found = self.siblings.find(name, &self.name);
        let waits = self.admission.ask();
        // The flow has one for its own half.
        let (waits, descriptor) = match waits.and_then(|waits| Ok((waits, self.admission.descriptor()?))) {
            Ok(shares) => shares,
            Err(reason) => {
                self.log_bound(now, &rule, to, reason);
                self.muxer.refused(id, reason);
                return;
            }
        };
        let pair = UnixStream::pair().and_then(|(ours, theirs)| {
            let caller = format!("guest://{}:{guest_port}", self.name);
            let mut theirs = HostStream::new(theirs.into())?.with_peer(caller);
            theirs.hold(descriptor);
            Ok((HostStream::new(ours.into())?.with_peer(target.clone()), theirs))
        });
        let reason = match (found, pair) {
            (Some((sibling, may)), Ok((ours, theirs))) => {
                let handle = self.handle.clone();
                let token = id.token();
                let answer = SiblingAnswer::new(target.clone(), move |result| {
                    let took = now.elapsed();
                    // A device that is gone needs no answer.
                    let _ = handle.send(Command::SiblingAnswered { token, result, took });
                });
                if let Some(flow) = self.flows.get_mut(id) {
                    flow.end = HostEnd::Asking(ours);
                }
                let request = SiblingRequest {
                    rule: may,
                    peer: Arc::clone(&self.name),
                    address: (self.cid, guest_port),
                    port: to,
                    seqpacket,
                    stream: theirs,
                    ears,
                    answer,
                    _waits: waits,
                };
                // What a device that is gone does not take is dropped, which is an answer too.
                let _ = sibling.send(Command::Sibling(Box::new(request)));
                return;
            }
            (None, _) => {
                if self.logbook.target_failed(now, rule.id) {
                    warn!(guest = %self.name, target, "a rule leads to a guest that does not run");
                }
                RefuseReason::Unreachable
            }
            (_, Err(error)) => {
                if self.logbook.target_failed(now, rule.id) {
                    warn!(guest = %self.name, target, %error, "no socket pair for a connection to another guest");
                }
                RefuseReason::Limit
            }
        };
        self.muxer.refused(id, reason);
    }

    /// The guest that was asked has accepted, or not.
    pub(in crate::device) fn handle_sibling_answered(
        &mut self,
        now: Instant,
        token: u64,
        result: Result<(), DialError>,
        took: Duration,
    ) {
        // The connection may have ended meanwhile, and our half with it.
        let half = self
            .dialing(token)
            .and_then(|id| self.flows.get_mut(id))
            .and_then(Flow::take_half);
        if let Some(half) = half {
            self.handle_dialed(now, token, result.map(|()| half), took);
        }
    }

    /// Another guest wants a port of this one.
    pub(in crate::device) fn handle_sibling(&mut self, now: Instant, request: SiblingRequest) {
        let SiblingRequest {
            rule,
            peer,
            address: (cid, guest_port),
            port,
            seqpacket,
            stream,
            ears,
            answer,
            _waits,
        } = request;
        let caller = Caller {
            guest_port: Port(port),
            socket_type: match seqpacket {
                true => SocketType::Seqpacket,
                false => SocketType::Stream,
            },
            address: Some((Cid(u64::from(cid)), Port(guest_port))),
            waits: false,
        };
        let asked = match self.draining {
            true => Err(RefuseReason::Draining),
            false => self.let_in(now, &rule, caller),
        };
        let (id, place) = match asked {
            Ok(asked) => asked,
            Err(reason) => {
                if limits::is_bound(reason) {
                    self.log_bound(now, &rule, port, reason);
                }
                let metrics = rule.metrics();
                metrics.refused[reason as usize].inc();
                debug!(guest = %self.name, rule = metrics.name, port, %peer, reason = reason.label(), "refused another guest");
                answer.refused(reason);
                return;
            }
        };
        let host_port = self.muxer.connection(id).map_or(0, |c| c.key().peer_port.0);
        let mut flow = self.new_flow(id, rule, port, host_port, now, stream.peer().to_owned());
        flow.place = Some(place);
        flow.asked_by = Some(Box::new(answer));
        flow.ears = Some(ears);
        flow.room = Room::Awaited;
        if seqpacket {
            flow.messages = Some(Box::new(Messages::new(Wire::SIBLING)));
        }
        match self.register(&stream, id, flow.room) {
            Ok(()) => {
                flow.end = HostEnd::Connected(stream);
                self.flows.insert(flow);
            }
            Err(error) => {
                warn!(guest = %self.name, %error, "cannot watch the socket of another guest's connection");
                self.flows.insert(flow);
                self.muxer.refused(id, RefuseReason::Limit);
            }
        }
        self.handle_events(now);
    }
}
