//! What kubelet does with the pod: lays out volumes, starts containers in their order, asks their probes, ends them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::chart::Rendered;
use crate::container::Container;
use crate::machine::{Machine, prepare};
use crate::volumes::{Volumes, container, publish};
use crate::{PATIENCE, wait_until};

/// The pod, running. The machine goes before its back-end, files go last.
pub struct Pod {
    /// The VMM's container. `None` when it has ended.
    machine: Option<Machine>,
    /// Ours.
    pub sidecar: Container,
    manifest: Value,
    volumes: Volumes,
    _directory: tempfile::TempDir,
}

impl Pod {
    /// Starts the sidecar, then, when its startup probe has passed, the VMM. The calling thread is in the pod's network from then on.
    pub fn start(rendered: &Rendered) -> Pod {
        let pod = &rendered.pod;
        let directory = tempfile::tempdir().unwrap();
        // The containers' user goes through it, as through kubelet's directories.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory.path(), open).unwrap();
        let guest = directory.path().join("guest");
        prepare(&guest);
        let volumes = Volumes::make(directory.path(), pod);
        publish(volumes.path("vsock-sidecar-config"), "1", &rendered.config);

        let ours = container(pod, "initContainers", "vsock-sidecar");
        assert_eq!(pod["spec"]["initContainers"][0]["name"], "vsock-sidecar");
        let mut sidecar = Container::start(pod, ours, &volumes);
        passes(&mut sidecar, &ours["startupProbe"]);
        let socket = volumes.path("vsock-sidecar-socket").join("vsock.sock");
        assert!(socket.exists(), "started, and no socket for the VMM");
        assert!(sidecar.enter_network());

        let vmm = container(pod, "containers", "vmm");
        let machine = Machine::boot(pod, vmm, &volumes, &guest);
        for probe in ["readinessProbe", "livenessProbe"] {
            passes(&mut sidecar, &ours[probe]);
        }
        Pod {
            machine: Some(machine),
            sidecar,
            manifest: pod.clone(),
            volumes,
            _directory: directory,
        }
    }

    /// The running machine.
    pub fn vm(&mut self) -> &mut Machine {
        self.machine.as_mut().expect("the VMM runs")
    }

    /// The ConfigMap has changed.
    pub fn update(&self, version: &str, config: &str) {
        publish(self.volumes.path("vsock-sidecar-config"), version, config);
    }

    /// What a probe of the sidecar's container says now.
    pub fn probe(&self, probe: &str) -> Result<(), String> {
        let ours = container(&self.manifest, "initContainers", "vsock-sidecar");
        self.sidecar.probe(&ours[probe])
    }

    /// What Prometheus scrapes: the port of the container that is named for it, over the pod's network.
    pub fn metrics(&self) -> String {
        let ours = container(&self.manifest, "initContainers", "vsock-sidecar");
        let port = &crate::tools::named(&ours["ports"], "vsock-metrics")["containerPort"];
        let port = u16::try_from(port.as_u64().unwrap()).unwrap();
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, page) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(!head.to_ascii_lowercase().contains("chunked"), "{head}");
        page.to_owned()
    }

    /// A sample without labels.
    pub fn metric(&self, name: &str) -> f64 {
        let page = self.metrics();
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
    }

    /// Waits for the VMM's end, which was asked for.
    pub fn vmm_ends(&mut self) -> ExitStatus {
        let vm = self.vm();
        wait_until("the VMM ends", || vm.ended().is_some());
        let status = vm.ended().expect("it has");
        vm.is_well();
        self.machine = None;
        status
    }

    /// Waits for the sidecar's end, which was asked for.
    pub fn sidecar_ends(&mut self) -> ExitStatus {
        let sidecar = &mut self.sidecar;
        wait_until("the sidecar ends", || sidecar.ended().is_some());
        sidecar.ended().expect("it has")
    }
}

/// A probe passes within the time that the manifest gives it.
fn passes(sidecar: &mut Container, probe: &Value) {
    let seconds = |key: &str| probe[key].as_u64().unwrap();
    let deadline =
        Instant::now() + Duration::from_secs(seconds("periodSeconds") * seconds("failureThreshold"));
    while let Err(said) = sidecar.probe(probe) {
        let ended = sidecar.ended();
        assert!(ended.is_none(), "{ended:?}");
        assert!(Instant::now() < deadline, "{}: {said}", probe["exec"]);
        // More often than the manifest's period, which would only make this slower.
        thread::sleep(Duration::from_millis(20));
    }
}
