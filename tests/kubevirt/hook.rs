//! The hooks' server, as virt-launcher uses it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use tonic::Code;
use vsock_sidecar::kubevirt::hook::messages::{
    CloudInit, Empty, MutateDomainRequest, MutateDomainResponse, OnDefineDomainParams, OnDefineDomainResult,
    SidecarContext,
};

use super::support::*;

const VMI: &str =
    r#"{"metadata":{"name":"web","namespace":"shop"},"spec":{"evictionStrategy":"LiveMigrate"}}"#;

fn asked(domain: &str, vmi: &str) -> OnDefineDomainParams {
    OnDefineDomainParams {
        domain_xml: domain.into(),
        vmi: vmi.into(),
    }
}

#[test]
fn a_virtual_machine_from_its_definition_to_its_end() {
    let (mut pod, launcher) = (Pod::empty(), Launcher::new());
    pod.spawn(&pod.configuration(""));

    let info = launcher.collect(&mut pod);
    assert_eq!(info.name, "vsock-sidecar");
    assert_eq!(info.versions, ["v1alpha3"]);
    let points: Vec<&str> = info.hook_points.iter().map(|point| point.name.as_str()).collect();
    assert_eq!(points, ["OnDefineDomain", "Shutdown"]);

    let before = fs::read_to_string(super::domains::directory().join("ignition.xml")).unwrap();
    let define = |domain: &str| -> String {
        let result: OnDefineDomainResult = launcher.call(&pod.hook(), DEFINE, asked(domain, VMI)).unwrap();
        String::from_utf8(result.domain_xml).unwrap()
    };
    let once = define(&before);
    let socket = pod.socket().display().to_string();
    let after = fs::read_to_string(super::domains::directory().join("ignition.after.xml")).unwrap();
    assert_eq!(
        once,
        after.replace(vsock_sidecar::kubevirt::DEFAULT_SOCKET, &socket)
    );
    assert_eq!(
        define(&once),
        once,
        "KubeVirt defines a domain again whenever it synchronises"
    );
    // The log is written a little later than what it tells of happens.
    let warnings = || pod.log().matches("cannot be migrated").count();
    until("the warning about the VMI", || (warnings() > 0).then_some(()));
    assert_eq!(warnings(), 1, "what is wrong with a VMI is said once");

    let answer: Empty = launcher.call(&pod.hook(), SHUTDOWN, Empty {}).unwrap();
    assert_eq!(answer, Empty {});
    assert_eq!(pod.end().code(), Some(0), "{}", pod.log());
    assert!(
        !pod.hook().exists() && !pod.socket().exists(),
        "sockets are left behind"
    );
}

/// virt-launcher starts QEMU when the hook has answered, and QEMU ends when nobody listens on the vhost-user socket. Nothing
/// else orders the containers.
#[test]
fn the_hooks_file_is_not_there_before_the_vhost_user_socket_listens() {
    for _ in 0..10 {
        let mut pod = Pod::empty();
        let (hook, socket) = (pod.hook(), pod.socket());
        let watcher = thread::spawn(move || {
            until("the hook's file", || hook.exists().then_some(()));
            UnixStream::connect(&socket).map(drop)
        });
        pod.spawn(&pod.configuration(""));
        watcher.join().unwrap().expect("the vhost-user socket listens");
        // For user and group, of which one is QEMU's. The mode comes a moment after the file, and before anybody can connect.
        until("the hook is for user and group", || {
            let mode = fs::metadata(pod.hook()).ok()?.permissions().mode();
            (mode & 0o7777 == 0o660).then_some(())
        });
        pod.assert_running();
    }
}

#[test]
fn a_plugins_sidecar_answers_as_well() {
    let (pod, launcher) = (Pod::start(), Launcher::new());
    let mutate = |domain_type: &str, domain: &str| -> String {
        let asked = MutateDomainRequest {
            domain_type: domain_type.into(),
            domain: domain.into(),
            vmi: VMI.into(),
            context: Some(SidecarContext {
                invocation: "Boot".into(),
            }),
        };
        let answer: MutateDomainResponse = launcher.call(&pod.hook(), MUTATE, asked).unwrap();
        String::from_utf8(answer.domain).unwrap()
    };
    let once = mutate("libvirt", "<domain type='kvm'/>");
    assert!(
        once.contains("id=vsocksidecar0,path=") && once.contains("<access mode='shared'/>"),
        "{once}"
    );
    assert_eq!(mutate("libvirt", &once), once);
    assert_eq!(mutate("other", "whatever"), "whatever");
}

#[test]
fn cloud_init_comes_back_as_it_was() {
    let (pod, launcher) = (Pod::start(), Launcher::new());
    let asked = CloudInit {
        no_cloud_source: b"{\"userData\":\"a\"}".into(),
        vmi: VMI.into(),
        data: b"{\"DataSource\":\"noCloud\"}".into(),
    };
    let answer: CloudInit = launcher.call(&pod.hook(), CLOUD_INIT, asked.clone()).unwrap();
    assert_eq!(
        (answer.no_cloud_source, answer.data),
        (asked.no_cloud_source, asked.data)
    );
    assert_eq!(answer.vmi, b"", "the result has no such field");
}

#[test]
fn what_is_refused_ends_the_call_and_nothing_else() {
    let (pod, launcher) = (Pod::start(), Launcher::new());
    let refused = |domain: &str, vmi: &str| {
        let answer: Result<OnDefineDomainResult, _> = launcher.call(&pod.hook(), DEFINE, asked(domain, vmi));
        let status = answer.unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let autoattach = r#"{"spec":{"domain":{"devices":{"autoattachVSOCK":true}}}}"#;
    for (domain, vmi, code, why) in [
        ("<domain>", "{}", Code::InvalidArgument, "line 1"),
        ("<domain/>", "{", Code::InvalidArgument, "no JSON"),
        (
            "<domain/>",
            autoattach,
            Code::FailedPrecondition,
            "spec.domain.devices.autoattachVSOCK",
        ),
        (
            "<domain><devices><vsock/></devices></domain>",
            "",
            Code::FailedPrecondition,
            "<vsock>",
        ),
    ] {
        let (found, said) = refused(domain, vmi);
        assert_eq!(found, code, "{said}");
        assert!(
            said.starts_with("vsock-sidecar: ") && said.contains(why),
            "{said}"
        );
    }
    let (code, said) = refused(&format!("<domain>{}</domain>", " ".repeat(5 << 20)), "{}");
    assert_eq!(code, Code::OutOfRange, "{said}");
    let unknown =
        launcher.call::<Empty, Empty>(&pod.hook(), "/kubevirt.hooks.v1alpha3.Callbacks/Reboot", Empty {});
    assert_eq!(unknown.unwrap_err().code(), Code::Unimplemented);
    let node = "/kubevirt.hooks.plugins.v1alpha1.NodeHookService/ExecuteNodeHook";
    assert_eq!(
        launcher
            .call::<Empty, Empty>(&pod.hook(), node, Empty {})
            .unwrap_err()
            .code(),
        Code::Unimplemented
    );
    let fine: OnDefineDomainResult = launcher
        .call(&pod.hook(), DEFINE, asked("<domain/>", VMI))
        .unwrap();
    assert!(fine.domain_xml.ends_with(b"</domain>"));
}

#[test]
fn sigterm_ends_it_as_shutdown_does() {
    let mut pod = Pod::start();
    pod.terminate();
    assert_eq!(pod.end().code(), Some(0));
    assert!(!pod.hook().exists());
}

#[test]
fn a_hook_left_by_a_killed_sidecar_is_replaced_and_one_that_lives_is_not() {
    let mut pod = Pod::start();
    pod.kill();
    assert!(pod.hook().exists(), "a killed process leaves its socket's file");
    pod.spawn(&pod.configuration(""));
    let launcher = Launcher::new();
    until("the hook answers", || {
        pod.assert_running();
        launcher
            .call::<_, vsock_sidecar::kubevirt::hook::messages::InfoResult>(&pod.hook(), INFO, Empty {})
            .ok()
    });
    pod.kill();

    fs::remove_file(pod.hook()).unwrap();
    let _other = UnixListener::bind(pod.hook()).unwrap();
    pod.spawn(&pod.configuration(""));
    assert_eq!(pod.end().code(), Some(64));
    assert!(pod.log().contains("served by another process"), "{}", pod.log());
    assert!(!pod.socket().exists(), "the vhost-user socket is left behind");
}

/// What cannot work is refused before anything is served.
#[test]
fn a_pod_that_cannot_work_is_refused_at_the_start() {
    let refused = |configuration: fn(&Pod) -> String, why: &str| {
        let mut pod = Pod::empty();
        let configuration = configuration(&pod);
        pod.spawn(&configuration);
        assert_eq!(pod.end().code(), Some(64), "{}", pod.log());
        assert!(pod.log().contains(why), "{}", pod.log());
        assert!(!pod.hook().exists());
    };
    refused(
        |pod| {
            let second = pod.hooks().join("userdata/b.sock").display().to_string();
            let rest = format!("- {{name: b, cid: 4, vhostUser: {{socket: {second}}}}}\n");
            pod.configuration("") + &rest
        },
        "the configuration has 2",
    );
    refused(
        |pod| pod.configuration("").replace("userdata/", ""),
        "is beside the hook's socket",
    );
    refused(
        |pod| pod.configuration("").replace("kubevirt-hooks/userdata/", ""),
        "--kubevirt-socket",
    );
    refused(
        |pod| pod.configuration("").replace("socket:", "mode: client, socket:"),
        "vhostUser.mode is client",
    );
}

/// What KubeVirt says by its environment, for a hook sidecar whose part of the volume has a name of its own in `compute`.
#[test]
fn the_path_in_the_domain_is_the_one_that_compute_sees() {
    let (mut pod, launcher) = (Pod::empty(), Launcher::new());
    pod.spawn_as(Some("hook-sidecar-0"), &pod.configuration(""), &[]);
    launcher.collect(&mut pod);
    let answer: OnDefineDomainResult = launcher
        .call(&pod.hook(), DEFINE, asked("<domain/>", ""))
        .unwrap();
    let domain = String::from_utf8(answer.domain_xml).unwrap();
    let path = pod.hooks().join("hook-sidecar-0/userdata/vsock.sock");
    assert!(domain.contains(&format!(",path={}'", path.display())), "{domain}");
}

#[test]
fn the_path_in_the_domain_is_the_operators_if_he_gives_one() {
    let (mut pod, launcher) = (Pod::empty(), Launcher::new());
    let configuration = pod.configuration("").replace("kubevirt-hooks/userdata/", "");
    pod.spawn_as(
        Some("hook-sidecar-0"),
        &configuration,
        &["--kubevirt-socket", "/shared/vsock.sock"],
    );
    launcher.collect(&mut pod);
    let answer: OnDefineDomainResult = launcher
        .call(&pod.hook(), DEFINE, asked("<domain/>", ""))
        .unwrap();
    let domain = String::from_utf8(answer.domain_xml).unwrap();
    assert!(domain.contains(",path=/shared/vsock.sock'"), "{domain}");
}
