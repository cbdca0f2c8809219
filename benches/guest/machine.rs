//! A machine under QEMU with a device of ours or of the peer, and the service that its guest talks to.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use vsock_sidecar::demo::vm::qemu::{Accelerator, Answer, Options, Vm, complaint};

use crate::contender::{Outcome, Who};
use crate::options::Setting;
use crate::peer::{Peer, PeerGuest};
use crate::support::Sidecar;
use crate::task::{Done, Task, Tasks};
use crate::vm::assets::assets;

const CID: u32 = 3;
/// Where the guest finds the service.
const PORT: u32 = 1000;

/// What the guest's vsock device is served by.
enum Device {
    Ours(Box<Sidecar>),
    Peer(Peer),
}

/// A guest that has booted. Field order: the machine ends before its device, files go last.
pub struct Machine {
    vm: Vm,
    device: Device,
    tasks: Tasks,
    /// Jobs of the guest so far, to name the next.
    jobs: u32,
    _dir: tempfile::TempDir,
}

impl Machine {
    /// Boots a guest with this kernel.
    fn boot(kernel: &str, who: Who, setting: &Setting) -> Outcome<Machine> {
        let assets = assets(kernel);
        let dir = tempfile::tempdir()?;
        let (socket, base) = (dir.path().join("vhost.sock"), dir.path().join("service"));
        let service = dir.path().join(format!("service_{PORT}"));
        let tasks = Tasks::start(&service);
        let device = match who {
            Who::Peer => {
                let guest = PeerGuest {
                    cid: CID,
                    socket: socket.clone(),
                    base,
                };
                Device::Peer(Peer::start(&setting.peer, &[guest])?)
            }
            _ => Device::Ours(Box::new(sidecar(&socket, &service))),
        };
        let vm = Vm::boot(&assets, &socket, dir.path(), &Options::default(), &mut || true)?;
        Ok(Machine {
            vm,
            device,
            tasks,
            jobs: 0,
            _dir: dir,
        })
    }

    /// Has the service and the guest work together: `steps` are those of `tests/guest/src/script.rs`, `times` the connections that
    /// they make, one after the other. `patience` is for all of it.
    pub fn work(
        &mut self,
        task: Task,
        steps: &str,
        times: u32,
        patience: Duration,
    ) -> Outcome<(Vec<Done>, Answer)> {
        self.jobs += 1;
        let job = self.jobs;
        let how = if times == 1 {
            "client".to_owned()
        } else {
            format!("repeat {times}")
        };
        self.tasks.set(task);
        self.answer(&format!("bg {job} {how} {PORT} {steps}"))?;
        // In the background, since the guest may wait for ever for what a device has lost.
        let done = (0..times)
            .map(|_| self.tasks.done(patience))
            .collect::<Outcome<Vec<_>>>()?;
        let answer = self.answer(&format!("join {job}"))?;
        if let Some(error) = done.iter().find_map(|done| done.result.as_ref().err()) {
            return Err(error.to_string().into());
        }
        Ok((done, answer))
    }

    fn answer(&mut self, command: &str) -> Outcome<Answer> {
        let answer = self.vm.answer(command, &mut || true)?.success();
        answer.map_err(|error| match complaint(&self.vm.console()) {
            Some(complaint) => format!("the guest's kernel complains: {complaint}").into(),
            None => error.into(),
        })
    }

    /// Whether a processor runs the guest, rather than QEMU's emulation of one.
    pub fn has_kvm(&self) -> bool {
        self.vm.accelerator() == Accelerator::Kvm
    }

    /// The device's process.
    pub fn device(&self) -> u32 {
        match &self.device {
            Device::Ours(sidecar) => sidecar.pid(),
            Device::Peer(peer) => peer.pid(),
        }
    }
}

fn sidecar(socket: &Path, service: &Path) -> Sidecar {
    Sidecar::start(&format!(
        "log: {{format: json, level: info}}\nguests:\n- name: linux\n  cid: {CID}\n  vhostUser: {{socket: \"{}\"}}\n  \
         outbound: [{{name: service, port: {PORT}, to: \"unix://{}\"}}]\n",
        socket.display(),
        service.display()
    ))
}

/// Where a machine stands from line to line: it boots when it is first asked for, and again when something had gone wrong.
#[derive(Clone)]
pub struct Place {
    kernel: &'static str,
    who: Who,
    machine: Rc<RefCell<Option<Machine>>>,
}

impl Place {
    pub fn new(kernel: &'static str, who: Who) -> Place {
        Place {
            kernel,
            who,
            machine: Rc::default(),
        }
    }

    /// Boots the machine if it does not run.
    pub fn boot(&self, setting: &Setting) -> Outcome<()> {
        let mut machine = self.machine.borrow_mut();
        if machine.is_none() {
            *machine = Some(Machine::boot(self.kernel, self.who, setting)?);
        }
        Ok(())
    }

    /// Works with the machine. One that failed is not used again.
    pub fn with<T>(&self, work: impl FnOnce(&mut Machine) -> Outcome<T>) -> Outcome<T> {
        let mut machine = self.machine.take().ok_or("the machine has failed before")?;
        let result = work(&mut machine)?;
        self.machine.replace(Some(machine));
        Ok(result)
    }
}
