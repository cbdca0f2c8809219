//! The other end of a vhost-user session, as a script: answers everything, notes everything, asks when it is told to.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::embedded_guest::message::{self, Message, NEED_REPLY, REPLY, request};
use crate::embedded_guest::misses::{BACKEND_IOTLB_MSG, MISS};
use crate::embedded_guest::profile::{feature, protocol_feature};
use crate::embedded_guest::wire::send_message;
use crate::embedded_guest::{FrontEnd, Profile, recv_message};

const SOON: Duration = Duration::from_secs(10);

/// Called with each message before it is answered.
type Hook = Box<dyn FnMut(&Message, &BackEnd) + Send>;

/// A back-end on a thread of its own.
#[derive(Clone)]
pub struct BackEnd {
    shared: Arc<Shared>,
}

struct Shared {
    socket: UnixStream,
    channel: Mutex<Option<UnixStream>>,
    log: Mutex<Vec<(u32, Vec<u8>)>>,
    hook: Mutex<Option<Hook>>,
}

impl BackEnd {
    /// A back-end and a front-end that has negotiated with it.
    pub fn negotiated(profile: Profile) -> (BackEnd, FrontEnd) {
        let (back_end, mut front_end) = BackEnd::connected(profile);
        front_end.negotiate().unwrap();
        (back_end, front_end)
    }

    /// A back-end and a front-end that has not spoken yet.
    pub fn connected(profile: Profile) -> (BackEnd, FrontEnd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let back_end = BackEnd {
            shared: Arc::new(Shared {
                socket: ours,
                channel: Mutex::default(),
                log: Mutex::default(),
                hook: Mutex::default(),
            }),
        };
        let served = back_end.clone();
        std::thread::spawn(move || served.serve());
        (back_end, FrontEnd::from_stream(theirs, profile))
    }

    /// Shows each message to `hook` before it is answered.
    pub fn on_message(&self, hook: impl FnMut(&Message, &BackEnd) + Send + 'static) {
        *self.shared.hook.lock().unwrap() = Some(Box::new(hook));
    }

    /// Asks for a translation.
    pub fn ask(&self, iova: u64, perm: u8) {
        let payload = message::iotlb(iova, 0, 0, perm, MISS);
        send_message(&self.channel(), BACKEND_IOTLB_MSG, NEED_REPLY, &payload, &[]).unwrap();
    }

    /// The front-end's answer to what was asked.
    pub fn answer(&self) -> u64 {
        let reply = recv_message(&self.channel(), SOON).unwrap();
        assert_eq!(
            (reply.request, reply.flags),
            (BACKEND_IOTLB_MSG, message::VERSION | REPLY)
        );
        reply.u64().unwrap()
    }

    /// What came so far, and forgets it.
    pub fn take_log(&self) -> Vec<(u32, Vec<u8>)> {
        std::mem::take(&mut self.log())
    }

    /// What came so far.
    pub fn log(&self) -> MutexGuard<'_, Vec<(u32, Vec<u8>)>> {
        self.shared.log.lock().unwrap()
    }

    fn channel(&self) -> UnixStream {
        let channel = self.shared.channel.lock().unwrap();
        channel.as_ref().unwrap().try_clone().unwrap()
    }

    fn serve(&self) {
        let socket = &self.shared.socket;
        while let Ok(mut message) = recv_message(socket, Duration::from_secs(60)) {
            let number = message.request;
            if number == request::SET_BACKEND_REQ_FD {
                *self.shared.channel.lock().unwrap() = message.fds.pop().map(UnixStream::from);
            }
            let u64 = |value: u64| value.to_ne_bytes().to_vec();
            let answer = match number {
                request::GET_FEATURES => {
                    u64(feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::ACCESS_PLATFORM)
                }
                request::GET_PROTOCOL_FEATURES => u64(protocol_feature::MQ
                    | protocol_feature::REPLY_ACK
                    | protocol_feature::BACKEND_REQ
                    | protocol_feature::CONFIG),
                request::GET_QUEUE_NUM => u64(3),
                request::GET_CONFIG => message::config(0, 0, &3u64.to_le_bytes()),
                request::GET_VRING_BASE => message.payload.clone(),
                _ => u64(0),
            };
            self.log().push((number, message.payload.clone()));
            if let Some(hook) = &mut *self.shared.hook.lock().unwrap() {
                hook(&message, self);
            }
            let asked = message::name(number).starts_with("GET_");
            if asked || message.flags & NEED_REPLY != 0 {
                send_message(socket, number, REPLY, &answer, &[]).unwrap();
            }
        }
    }
}
