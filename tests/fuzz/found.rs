//! What was found by fuzzing and is no matter of a case's bytes.

use std::io::Write;
use std::time::{Duration, Instant};

use vsock_sidecar::vhost_user::message::{Message, VERSION, request};
use vsock_sidecar::vhost_user::{AccessPlatform, Mode};

use super::session::Live;

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
