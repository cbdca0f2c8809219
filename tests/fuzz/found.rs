//! What was found by fuzzing and is no matter of a case's bytes.

use std::io::Write;
use std::time::{Duration, Instant};

use vsock_sidecar::vhost_user::features::offered_features;
use vsock_sidecar::vhost_user::gate::Gate;
use vsock_sidecar::vhost_user::message::{Message, VERSION, request};
use vsock_sidecar::vhost_user::{AccessPlatform, Mode};

use super::session::Live;
use super::steps::{Boot, Case, Fd, RAM_UADDR, Request, Step, iotlb_body};

/// The end of the protocol handler's thread had woken the session thread, which took that for a reason to end the pause
/// before the next attempt: a VMM that listens and drops whoever comes kept a core busy. Nor did a shutdown in that moment
/// end the pause after it.
#[test]
fn a_vmm_that_listens_and_drops_us_is_not_called_again_at_once() {
    let live = Live::new();
    let served = live.serve(AccessPlatform::Auto, Mode::Client);
    let listener = served.listener.as_ref().expect("a VMM that listens");
    for _ in 0..5 {
        let (mut vmm, _) = listener.accept().expect("the session connects");
        vmm.write_all(Message::new(request::GET_FEATURES, VERSION, &[]).bytes())
            .expect("the session listens");
        drop(vmm);
        let dropped = Instant::now();
        let _called_again = listener.accept().expect("the session connects again");
        assert!(dropped.elapsed() >= Duration::from_millis(100));
    }
    served.handle.shutdown();
}

/// The protocol handler maps a dirty log without a look at its file, and the first mark beyond the file's end was a SIGBUS:
/// the end of the process, and of every other guest in it.
#[test]
fn a_dirty_log_that_ends_beyond_its_file_is_refused() {
    let mut live = Live::new();
    // The file has 0x2000 bytes.
    for (size, offset, fits) in [
        (0x2000u64, 0u64, true),
        (0x1000, 0x1000, true),
        (0x2000, 0x2000, false),
        (0x2001, 0, false),
        (u64::MAX, 0x1000, false),
    ] {
        let mut case = Case::decode(&[0, 10, 4]);
        let body = [size, offset].map(u64::to_ne_bytes).concat();
        case.steps.push(Step::Request(Request {
            message: Message::new(request::SET_LOG_BASE, VERSION, &body),
            fds: vec![Fd::Small],
        }));
        case.steps.push(Step::Kick(1));
        live.run(&case);
        let said = live.last_end();
        let refused = said.contains("ends beyond its file, which has 0x2000");
        // One that is too small for the guest's memory is refused by the protocol handler.
        assert_eq!(refused, !fits, "{size:#x} bytes from {offset:#x} on: {said}");
    }
}

/// Only rings that had been set up since the feature was acknowledged were set up anew when the first IOTLB message came;
/// others went on with the VMM's addresses, in a session that must not fall back to these.
#[test]
fn rings_that_were_set_up_before_the_feature_was_acknowledged_are_translated_too() {
    for (policy, evidence) in [(AccessPlatform::Iotlb, false), (AccessPlatform::Auto, true)] {
        let mut gate = Gate::new(Mode::Server, policy);
        let plain = Boot {
            realize: true,
            platform: false,
            iovas: false,
        };
        let mut said = Vec::new();
        let features = offered_features(policy).to_ne_bytes();
        let update = iotlb_body(0x5000, 0x1000, RAM_UADDR, 3, 2);
        let acknowledges = Message::new(request::SET_FEATURES, VERSION, &features);
        let maps = Message::new(request::IOTLB_MSG, VERSION, &update);
        for request in plain.requests(policy, Mode::Server) {
            gate.request(&request.message, request.fds.len());
        }
        said.extend(gate.request(&acknowledges, 0).before);
        if evidence {
            said.extend(gate.request(&maps, 0).before);
        }
        let notes: Vec<_> = said.iter().filter_map(|passage| passage.note).collect();
        assert_eq!(notes.len(), 2, "{policy:?}: {said:?}");
        assert!(notes.iter().all(|note| note.iovas.is_some()), "{notes:?}");
    }
}
