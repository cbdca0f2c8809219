//! Alone in its process, because it counts what the process has open.

#[path = "session/support.rs"]
mod support;

use support::*;
use vsock_sidecar::vhost_user::Mode;
use vsock_sidecar::vhost_user::message::request;

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|line| line.contains("memfd:guest"))
        .count()
}

#[test]
fn a_hundred_vmms_leave_no_descriptor_thread_mapping_or_file() {
    let mut rig = Rig::new(Mode::Server);
    let session = |number: u64| {
        let vmm = rig.connect();
        match number % 4 {
            // Killed while its rings run.
            0 => {
                let setup = vmm.realize();
                vmm.start(&setup);
            }
            // Leaves in good order.
            1 => {
                let setup = vmm.realize();
                vmm.start(&setup);
                vmm.stop();
            }
            // Breaks the protocol.
            2 => {
                vmm.realize();
                vmm.send(4711, &[], &[]);
                vmm.wait_closed();
            }
            // Asks, and does not wait for the answer.
            _ => vmm.send(request::GET_FEATURES, &[], &[]),
        }
        drop(vmm);
        rig.wait_end(number);
        wait_until("the memory to be unmapped", || mappings() == 0);
    };
    for number in 1..=4 {
        session(number);
    }
    let (fds, threads) = (count("/proc/self/fd"), count("/proc/self/task"));
    for number in 5..=104 {
        session(number);
    }
    wait_until("descriptors to be closed", || count("/proc/self/fd") <= fds);
    wait_until("threads to end", || count("/proc/self/task") <= threads);
    assert_eq!(
        count(rig.directory.path().to_str().unwrap()),
        1,
        "the socket and nothing else"
    );
    assert_eq!(rig.negotiation().sessions_total, 104);
    rig.shutdown();
    assert_eq!(count(rig.directory.path().to_str().unwrap()), 0);
}
