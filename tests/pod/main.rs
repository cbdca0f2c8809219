//! A pod on one machine, from the chart to the last exit code: what Helm renders is what runs.
//!
//! - [`chart`]: the sample pod and its ConfigMap, rendered with the values of this directory;
//! - [`volumes`], [`built`], [`container`]: the sidecar's container by runc, out of the image, with the manifest's user, mounts and environment,
//!   and a network of its own, which is the pod's;
//! - [`machine`]: the VMM's container: QEMU as the pod's user with the manifest's arguments, and Linux in it;
//! - [`kubelet`]: the order in which things begin, the exec probes, the ConfigMap's updates;
//! - [`services`], [`alerts`]: what the guest talks to, and what Prometheus would make of it.
//!
//! There is no Kubernetes: the API server, the scheduler and kubelet's own timing are not tested. For the runtime's default seccomp profile,
//! which each runtime has its own of, stands the stricter one of `deploy/seccomp`. `sh tests/setup.sh` installs the tools, and root is needed
//! for containers. `VSOCK_TEST_NO_VM=1` leaves this out, as in `tests/real_guest`.

mod alerts;
// The tools of the charts' tests, and of those of the image.
#[allow(dead_code)]
#[path = "../deploy/built.rs"]
mod built;
mod chart;
#[allow(dead_code)]
#[path = "../charts/tools.rs"]
mod charts;
mod container;
mod kubelet;
mod machine;
mod services;
#[allow(dead_code)]
#[path = "../deploy/tools.rs"]
mod tools;
#[allow(dead_code)]
#[path = "../vm/mod.rs"]
mod vm;
mod volumes;

use std::io::ErrorKind;
use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use chart::render;
use kubelet::Pod;
use services::{Transfer, serve};
use vm::service::{connect_tcp, echo, exchange, sink};

/// No step of a healthy test takes as long, not even on a loaded machine without KVM. Less than what `tests/pod/values.yaml` gives a drain.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    vm::wait_until(what, PATIENCE, condition);
}

/// Runs a test in a thread of its own, which is to enter the pod's network and would not find back.
fn in_pod(test: impl FnOnce() + Send + 'static) {
    if std::env::var_os("VSOCK_TEST_NO_VM").is_some() {
        let ci = std::env::var_os("CI");
        assert!(ci.is_none(), "CI runs the pod: unset VSOCK_TEST_NO_VM");
        vm::lab::tell("the pod: left out, as VSOCK_TEST_NO_VM says");
        return;
    }
    if let Err(panic) = thread::spawn(test).join() {
        resume_unwind(panic);
    }
}

/// A connection from outside through the pod's inbound rule, there and back.
fn from_host() -> std::io::Result<()> {
    exchange(&connect_tcp(2222)?, 100_000, 5)
}

#[test]
fn a_native_sidecar_takes_rules_while_a_transfer_runs_survives_a_mistake_and_ends_behind_its_vmm() {
    in_pod(|| {
        let before = render(None, &[]);
        let after = render(Some("rule.yaml"), &[]);
        assert_eq!(before.pod, after.pod, "else Kubernetes would not have it updated");
        let broken = after.config.replace("port: 9002", "port: nine");
        assert_ne!(broken, after.config);

        let mut pod = Pod::start(&before);
        let transfer = Transfer::serve(9001);
        let _echo = serve(9002, echo());
        pod.vm().ok("serve 22 echo");
        pod.vm().ok("bg transfer client 9001 echo");
        transfer.goes_on();
        let by_new_rule = "client 9002 exchange:bytes=100000,seed=3";
        let refused = pod.vm().answer(by_new_rule);
        assert!(refused.starts_with("err ECONNRESET"), "{refused}");
        let healthy = pod.metrics();
        alerts::fire(&[&healthy], &[]);

        // One more rule.
        let swapped = Instant::now();
        pod.update("2", &after.config);
        wait_until("the new rule works", || {
            pod.vm().answer(by_new_rule).starts_with("ok ")
        });
        vm::lab::tell(&format!(
            "the new rule works after {:.1} s",
            swapped.elapsed().as_secs_f64()
        ));
        transfer.goes_on();
        from_host().unwrap();
        wait_until("the reload is counted", || {
            pod.metric("vsock_config_last_reload_successful") == 1.0
        });

        // A mistake: it is told, and all stays as it was.
        pod.update("3", &broken);
        wait_until("the mistake is seen", || {
            pod.metric("vsock_config_last_reload_successful") == 0.0
        });
        transfer.goes_on();
        pod.vm().ok(by_new_rule);
        from_host().unwrap();
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            pod.probe(probe).unwrap();
        }
        let said = pod.sidecar.output();
        assert!(said.contains("the new configuration is refused"), "{said}");
        let wrong = pod.metrics();
        let alert = ("VsockConfigReloadFailed", "warning");
        alerts::fire(&[&healthy, &wrong], &[alert]);

        // It is corrected.
        pod.update("4", &after.config);
        wait_until("the correction is seen", || {
            pod.metric("vsock_config_last_reload_successful") == 1.0
        });
        alerts::fire(&[&healthy, &wrong, &pod.metrics()], &[]);
        transfer.goes_on();
        transfer.ends_whole();
        pod.vm().ok("join transfer");

        // Kubernetes ends the containers, and when they have gone the native sidecars.
        pod.vm().terminate();
        pod.vmm_ends();
        assert!(pod.sidecar.ended().is_none(), "nobody has asked it to end");
        pod.probe("livenessProbe").unwrap();
        pod.sidecar.terminate();
        // Far from what `drain` allows.
        assert_eq!(pod.sidecar_ends().code(), Some(0));
        let said = pod.sidecar.output();
        assert!(said.contains("drained"), "{said}");
    });
}

/// As the same container would be among `containers`: SIGTERM comes at the same time as the VMM's, whose guest shuts down and still wants
/// its services.
#[test]
fn a_plain_container_serves_the_guest_until_it_has_shut_down() {
    in_pod(|| {
        let mut pod = Pod::start(&render(Some("rule.yaml"), &[]));
        let transfer = Transfer::serve(9001);
        let _echo = serve(9002, echo());
        pod.vm().ok("serve 22 echo");
        pod.vm().ok("bg transfer client 9001 echo");
        transfer.goes_on();
        from_host().unwrap();

        pod.sidecar.terminate();
        wait_until("nobody is sent here any more", || {
            pod.probe("readinessProbe").is_err()
        });
        wait_until(
            "host to guest is refused",
            || matches!(connect_tcp(2222), Err(error) if error.kind() == ErrorKind::ConnectionRefused),
        );
        // What is open goes on, and the guest's own connections are served.
        transfer.goes_on();
        pod.vm().ok("parallel 10 9002 exchange:bytes=100000,seed=3");
        transfer.ends_whole();
        pod.vm().ok("join transfer");
        // Also when nothing has been open for longer than a sidecar lingers unless told so (3 s): the guest is busy with its shutdown, for which
        // its program waits here for a connection that nobody makes.
        pod.vm().ok("serve 23 echo");
        let nobody = pod.vm().answer("served 23 4000");
        assert!(nobody.starts_with("err NONE"), "{nobody}");
        pod.vm().ok("client 9002 exchange:bytes=100000,seed=4");
        // Kubernetes does not have a plain container restarted for this, nor do we end by it.
        pod.probe("livenessProbe").unwrap();
        assert!(pod.sidecar.ended().is_none(), "the VMM is still there");

        pod.vm().start("poweroff");
        assert_eq!(pod.vmm_ends().code(), Some(0));
        assert_eq!(pod.sidecar_ends().code(), Some(0));
        let said = pod.sidecar.output();
        assert!(said.contains("drained"), "{said}");
        assert!(!said.contains("drain period is over"), "{said}");
    });
}

#[test]
fn a_plain_container_whose_vmm_stays_ends_when_the_drain_period_is_over() {
    in_pod(|| {
        let set = ["config.drain.timeout=1s", "config.drain.linger=1s"];
        let mut pod = Pod::start(&render(None, &set));
        let _sink = serve(9001, sink());
        pod.vm().ok("hold open 9001");
        pod.sidecar.terminate();
        assert_eq!(pod.sidecar_ends().code(), Some(0));
        let said = pod.sidecar.output();
        assert!(said.contains("drain period is over"), "{said}");
        // The guest is told, and lives. An RST reads as the end of an open connection (`virtio_transport_recv_connected` in Linux's
        // net/vmw_vsock/virtio_transport_common.c sets no error).
        let end = pod.vm().ok("watch open 20000");
        assert!(end.contains("end=eof"), "{end}");
        pod.vm().is_well();
    });
}
