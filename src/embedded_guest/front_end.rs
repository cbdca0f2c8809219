//! The VMM's half of vhost-user: a small front-end over a unix socket that can speak like QEMU, like the VMMs built
//! on rust-vmm, or in any wrong way a test asks for.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channels::{Channels, Server, accepted};
use super::dma::{Dma, IommuOptions};
use super::error::{Error, Result};
use super::fd::{EventFd, wait_readable};
use super::iommu::{Granule, Iommu, Lookup, WRITE};
use super::memory::{GuestMemory, Region};
use super::message::{self, Message, request};
use super::misses::{Answer, INVALIDATE, Miss, SeenMiss, UPDATE};
use super::profile::{Order, Profile, feature, protocol_feature};
use super::wire::{recv_message, send_bytes};

/// What was negotiated at realize time.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Negotiated {
    /// Feature bits the back-end offers.
    pub offered: u64,
    /// Feature bits that SET_FEATURES will acknowledge.
    pub features: u64,
    /// Protocol feature bits the back-end offers.
    pub protocol_offered: u64,
    /// Protocol feature bits taken.
    pub protocol_features: u64,
    /// The answer to GET_QUEUE_NUM, if it was asked.
    pub queue_num: Option<u64>,
    /// The answer to GET_MAX_MEM_SLOTS, if it was asked.
    pub max_mem_slots: Option<u64>,
    /// The guest's CID from the configuration space.
    pub guest_cid: u64,
}

/// One ring as the back-end must know it. Addresses are user addresses of the memory table, or IOVAs.
#[derive(Clone, Copy, Debug)]
pub struct RingSetup<'a> {
    /// 0 rx, 1 tx, 2 event.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Available index to start from.
    pub base: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Driver to device.
    pub kick: BorrowedFd<'a>,
    /// Device to driver.
    pub call: BorrowedFd<'a>,
}

/// A vhost-user connection, the VMM's end. Dropping it closes the socket: the VMM was killed.
#[derive(Debug)]
pub struct FrontEnd {
    channels: Arc<Channels>,
    profile: Profile,
    negotiated: Negotiated,
    /// The IOMMU behind which the device is.
    iommu: Option<Arc<Iommu>>,
    /// Descriptors the back-end may still use and nobody reads: error eventfds and the masked call eventfds.
    held: Vec<EventFd>,
    /// Guest addresses of the regions told with ADD_MEM_REG: QEMU does not repeat these when rings restart.
    slots: Vec<u64>,
}

impl FrontEnd {
    /// Connects to a back-end that listens at `path`.
    pub fn connect(path: &Path, profile: Profile) -> Result<FrontEnd> {
        let socket = UnixStream::connect(path).map_err(Error::io("connect to the vhost-user socket"))?;
        Ok(FrontEnd::from_stream(socket, profile))
    }

    /// Waits for a back-end in client mode to connect to `listener`.
    pub fn accept(listener: &UnixListener, profile: Profile, timeout: Duration) -> Result<FrontEnd> {
        if !wait_readable(&[listener.as_fd()], Some(Instant::now() + timeout))? {
            return Err(Error::Timeout {
                what: "waiting for the back-end to connect",
            });
        }
        let (socket, _) = listener.accept().map_err(Error::io("accept a back-end"))?;
        Ok(FrontEnd::from_stream(socket, profile))
    }

    /// A front-end on a connected socket.
    pub fn from_stream(socket: UnixStream, profile: Profile) -> FrontEnd {
        FrontEnd {
            channels: Arc::new(Channels::new(socket)),
            profile,
            negotiated: Negotiated::default(),
            iommu: None,
            held: Vec::new(),
            slots: Vec::new(),
        }
    }

    /// What [`FrontEnd::negotiate`] found.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// The profile this front-end speaks by.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The connection itself.
    pub fn socket(&self) -> &UnixStream {
        self.channels.main()
    }

    /// Our end of the channel for the back-end's requests; present after negotiation of BACKEND_REQ.
    pub fn backend_channel(&self) -> Option<Arc<UnixStream>> {
        self.channels.backend()
    }

    /// The realize phase, up to reading the guest's CID, in the profile's order of messages.
    pub fn negotiate(&mut self) -> Result<Negotiated> {
        match self.profile.order {
            Order::Qemu => self.negotiate_like_qemu()?,
            Order::RustVmm => self.negotiate_like_rust_vmm()?,
        }
        Ok(self.negotiated)
    }

    /// The DRIVER_OK phase: features, memory, rings. Afterwards the device runs.
    pub fn start(&mut self, memory: &GuestMemory, rings: &[RingSetup<'_>]) -> Result<()> {
        match self.profile.order {
            Order::Qemu => self.start_like_qemu(memory, rings),
            Order::RustVmm => self.start_like_rust_vmm(memory, rings),
        }
    }

    /// Stops `queues` rings as QEMU does for a reset, a pause or an orderly end; answers how far each got.
    pub fn stop(&mut self, queues: u16) -> Result<Vec<u16>> {
        for index in 0..queues {
            self.set_vring_enable(index, false)?;
        }
        (0..queues).map(|index| self.vring_base(index)).collect()
    }

    // ---- the phases --------------------------------------------------------------------------------------------

    /// QEMU's vhost_dev_init and vhost_user_backend_init, as seen on the wire.
    fn negotiate_like_qemu(&mut self) -> Result<()> {
        self.negotiated.offered = self.call_u64(request::GET_FEATURES)?;
        if self.negotiated.offered & feature::PROTOCOL_FEATURES != 0 {
            self.negotiate_protocol_features()?;
            if self.has(protocol_feature::CONFIGURE_MEM_SLOTS) {
                self.negotiated.max_mem_slots = Some(self.call_u64(request::GET_MAX_MEM_SLOTS)?);
            }
            if self.has(protocol_feature::BACKEND_REQ) {
                self.set_backend_channel()?;
            }
        }
        self.send(request::SET_OWNER, 0, &[], &[])?;
        self.negotiated.offered = self.call_u64(request::GET_FEATURES)?;
        self.choose_features();
        for index in 0..self.profile.queues {
            for number in [request::SET_VRING_CALL, request::SET_VRING_ERR] {
                let masked = EventFd::new()?;
                self.send(
                    number,
                    0,
                    &message::vring_fd(index.into(), false),
                    &[masked.as_fd()],
                )?;
                self.held.push(masked);
            }
        }
        self.negotiated.guest_cid = self.read_guest_cid()?;
        Ok(())
    }

    /// vhost_dev_start. Addresses first, enable last; the call eventfds are told once before (masked) and once after.
    fn start_like_qemu(&mut self, memory: &GuestMemory, rings: &[RingSetup<'_>]) -> Result<()> {
        // QEMU's masked notifier would be another eventfd here, whose signals it forwards at unmask. The same eventfd
        // twice is the same to the back-end and loses nothing.
        for ring in rings.iter().rev() {
            self.set_vring_call(ring.index, ring.call)?;
        }
        self.set_features(self.negotiated.features)?;
        self.send_memory(memory)?;
        if self.has(protocol_feature::STATUS) {
            let status = self.call_u64(request::GET_STATUS)?;
            self.send(request::SET_STATUS, 0, &(status | 8).to_ne_bytes(), &[])?;
        }
        for ring in rings {
            self.set_vring_num(ring.index, ring.size.into())?;
            self.set_vring_base(ring.index, ring.base)?;
            self.set_vring_addr(ring)?;
            // The ioeventfd is signalled once when QEMU takes it over: a back-end sees a kick before any buffer.
            let _ = rustix::io::write(ring.kick, &1u64.to_ne_bytes());
            self.set_vring_kick(ring.index, ring.kick)?;
        }
        for ring in rings {
            self.set_vring_enable(ring.index, true)?;
        }
        // vhost_dev_start ends with vhost_device_iotlb_miss for each ring: the page with the beginning of its used ring.
        for ring in rings {
            self.tell_translation(ring.used)?;
        }
        for ring in rings {
            self.set_vring_call(ring.index, ring.call)?;
        }
        Ok(())
    }

    /// cloud-hypervisor: virtio-devices/src/vhost_user/vu_common_ctrl.rs, negotiate_features_vhost_user.
    fn negotiate_like_rust_vmm(&mut self) -> Result<()> {
        self.send(request::SET_OWNER, 0, &[], &[])?;
        self.negotiated.offered = self.call_u64(request::GET_FEATURES)?;
        self.choose_features();
        if self.negotiated.offered & feature::PROTOCOL_FEATURES != 0 {
            self.negotiate_protocol_features()?;
        }
        if self.has(protocol_feature::BACKEND_REQ) {
            self.set_backend_channel()?;
        }
        self.negotiated.guest_cid = self.read_guest_cid()?;
        Ok(())
    }

    /// The same file, setup_vhost_user.
    fn start_like_rust_vmm(&mut self, memory: &GuestMemory, rings: &[RingSetup<'_>]) -> Result<()> {
        self.set_features(self.negotiated.features)?;
        self.send_memory(memory)?;
        for ring in rings {
            self.set_vring_num(ring.index, ring.size.into())?;
            self.set_vring_addr(ring)?;
            self.set_vring_base(ring.index, ring.base)?;
            self.set_vring_call(ring.index, ring.call)?;
            self.set_vring_kick(ring.index, ring.kick)?;
        }
        for ring in rings {
            self.set_vring_enable(ring.index, true)?;
        }
        Ok(())
    }

    fn negotiate_protocol_features(&mut self) -> Result<()> {
        self.negotiated.protocol_offered = self.call_u64(request::GET_PROTOCOL_FEATURES)?;
        self.negotiated.protocol_features = self.negotiated.protocol_offered & self.profile.protocol_features;
        let taken = self.negotiated.protocol_features;
        self.send(request::SET_PROTOCOL_FEATURES, 0, &taken.to_ne_bytes(), &[])?;
        if self.has(protocol_feature::MQ) {
            self.negotiated.queue_num = Some(self.call_u64(request::GET_QUEUE_NUM)?);
        }
        Ok(())
    }

    fn choose_features(&mut self) {
        self.negotiated.features =
            (self.negotiated.offered & self.profile.features) | self.profile.forced_features;
    }

    fn read_guest_cid(&mut self) -> Result<u64> {
        let data = self.config(0, 8)?;
        let bytes: [u8; 8] = data.as_slice().try_into().map_err(|_| Error::Protocol {
            what: format!(
                "GET_CONFIG answered {} bytes of configuration instead of 8",
                data.len()
            ),
        })?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set_backend_channel(&mut self) -> Result<()> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("make the back-end's request channel"))?;
        self.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()], Ack::IfAgreed)?;
        self.channels.set_backend(ours);
        Ok(())
    }

    fn send_memory(&mut self, memory: &GuestMemory) -> Result<()> {
        if !self.has(protocol_feature::CONFIGURE_MEM_SLOTS) {
            return self.set_mem_table(memory.regions());
        }
        for region in memory.regions() {
            if !self.slots.contains(&region.gpa()) {
                self.add_mem_reg(region)?;
            }
        }
        Ok(())
    }

    // ---- one method a message ----------------------------------------------------------------------------------

    /// SET_FEATURES with exactly these bits.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.tell(
            request::SET_FEATURES,
            &features.to_ne_bytes(),
            &[],
            Ack::AsProfile,
        )
    }

    /// SET_MEM_TABLE with these regions.
    pub fn set_mem_table(&mut self, regions: &[Region]) -> Result<()> {
        let mut payload = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
        for r in regions {
            payload.extend(message::memory_region(r.gpa(), r.size() as u64, r.user_addr(), 0));
        }
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(Region::fd).collect();
        self.tell(request::SET_MEM_TABLE, &payload, &fds, Ack::IfAgreed)
    }

    /// ADD_MEM_REG (needs CONFIGURE_MEM_SLOTS).
    pub fn add_mem_reg(&mut self, region: &Region) -> Result<()> {
        let payload = single_region(region);
        self.tell(request::ADD_MEM_REG, &payload, &[region.fd()], Ack::IfAgreed)?;
        self.slots.push(region.gpa());
        Ok(())
    }

    /// REM_MEM_REG (needs CONFIGURE_MEM_SLOTS).
    pub fn rem_mem_reg(&mut self, region: &Region) -> Result<()> {
        self.slots.retain(|gpa| *gpa != region.gpa());
        let payload = single_region(region);
        self.tell(request::REM_MEM_REG, &payload, &[], Ack::IfAgreed)
    }

    /// SET_VRING_NUM.
    pub fn set_vring_num(&mut self, index: u16, size: u32) -> Result<()> {
        self.tell(
            request::SET_VRING_NUM,
            &message::vring_state(index.into(), size),
            &[],
            Ack::AsProfile,
        )
    }

    /// SET_VRING_BASE.
    pub fn set_vring_base(&mut self, index: u16, base: u16) -> Result<()> {
        let payload = message::vring_state(index.into(), base.into());
        self.tell(request::SET_VRING_BASE, &payload, &[], Ack::AsProfile)
    }

    /// SET_VRING_ADDR, without dirty log.
    pub fn set_vring_addr(&mut self, ring: &RingSetup<'_>) -> Result<()> {
        // QEMU tells the used ring's address a second time, flags or not.
        let log = if self.iommu.is_some() { ring.used } else { 0 };
        let payload = message::vring_addr(ring.index.into(), 0, ring.desc, ring.used, ring.avail, log);
        self.tell(request::SET_VRING_ADDR, &payload, &[], Ack::AsProfile)
    }

    /// SET_VRING_KICK.
    pub fn set_vring_kick(&mut self, index: u16, kick: BorrowedFd<'_>) -> Result<()> {
        self.tell(
            request::SET_VRING_KICK,
            &message::vring_fd(index.into(), false),
            &[kick],
            Ack::AsProfile,
        )
    }

    /// SET_VRING_CALL.
    pub fn set_vring_call(&mut self, index: u16, call: BorrowedFd<'_>) -> Result<()> {
        self.tell(
            request::SET_VRING_CALL,
            &message::vring_fd(index.into(), false),
            &[call],
            Ack::AsProfile,
        )
    }

    /// SET_VRING_ENABLE.
    pub fn set_vring_enable(&mut self, index: u16, enable: bool) -> Result<()> {
        let payload = message::vring_state(index.into(), enable.into());
        self.tell(request::SET_VRING_ENABLE, &payload, &[], Ack::AsProfile)
    }

    /// GET_VRING_BASE: stops the ring; answers its available index.
    pub fn vring_base(&mut self, index: u16) -> Result<u16> {
        let reply = self.call(request::GET_VRING_BASE, &message::vring_state(index.into(), 0))?;
        match reply.payload.as_slice().try_into().map(u64::from_ne_bytes) {
            Ok(state) if state as u32 == u32::from(index) => Ok((state >> 32) as u16),
            _ => Err(Error::Protocol {
                what: format!("GET_VRING_BASE {index}: {:02x?}", reply.payload),
            }),
        }
    }

    /// GET_CONFIG.
    pub fn config(&mut self, offset: u32, len: usize) -> Result<Vec<u8>> {
        let reply = self.call(request::GET_CONFIG, &message::config(offset, 0, &vec![0; len]))?;
        match reply.payload.get(12..) {
            Some(data) => Ok(data.to_vec()),
            None => Err(Error::Protocol {
                what: "GET_CONFIG: the reply is too short".into(),
            }),
        }
    }

    /// RESET_DEVICE (needs the protocol feature).
    pub fn reset_device(&mut self) -> Result<()> {
        self.tell(request::RESET_DEVICE, &[], &[], Ack::AsProfile)
    }

    /// IOTLB_MSG UPDATE.
    pub fn iotlb_update(&mut self, iova: u64, size: u64, user_addr: u64, perm: u8) -> Result<()> {
        self.iotlb(iova, size, user_addr, perm, UPDATE)
    }

    /// IOTLB_MSG INVALIDATE; size 0 is everything.
    pub fn iotlb_invalidate(&mut self, iova: u64, size: u64) -> Result<()> {
        self.iotlb(iova, size, 0, 0, INVALIDATE)
    }

    /// IOTLB_MSG on the main channel; QEMU sends it with NEED_REPLY always.
    pub fn iotlb(&mut self, iova: u64, size: u64, user_addr: u64, perm: u8, kind: u8) -> Result<()> {
        self.tell(
            request::IOTLB_MSG,
            &message::iotlb(iova, size, user_addr, perm, kind),
            &[],
            Ack::Always,
        )
    }

    // ---- translation -------------------------------------------------------------------------------------------

    /// Puts the device behind an IOMMU from now on, and answers its misses as QEMU does.
    pub(super) fn attach_iommu(&mut self, options: &IommuOptions, memory: &GuestMemory) -> Result<Dma> {
        let iommu = Arc::new(Iommu::new(options.granule));
        if options.granule == Granule::Whole {
            for region in memory.regions() {
                iommu.map_region(region);
            }
        }
        self.channels.serve(Server {
            iommu: iommu.clone(),
            policy: Box::new(|_| Answer::AtOnce),
            nested: options.nested,
            exact_permission: options.exact_permission,
        })?;
        self.iommu = Some(iommu.clone());
        Ok(Dma::new(iommu, self.channels.clone(), options.clone()))
    }

    /// The IOMMU behind which the device is.
    pub fn iommu(&self) -> Option<&Arc<Iommu>> {
        self.iommu.as_ref()
    }

    /// Changes how misses are answered from now on.
    pub fn answer_misses(&self, policy: impl FnMut(&Miss) -> Answer + Send + 'static) {
        self.channels.set_policy(Box::new(policy));
    }

    /// Answers the misses that were put aside; how many there were.
    pub fn release_misses(&self) -> Result<usize> {
        self.channels.release()
    }

    /// The misses so far and what became of them, in the order in which they came.
    pub fn misses(&self) -> Vec<SeenMiss> {
        self.channels.seen()
    }

    /// Forgets the misses so far, unless some wait to be answered.
    pub fn forget_misses(&self) {
        self.channels.forget_seen();
    }

    /// Waits until the misses so far are such and such, and returns those: the next one may come at any time.
    pub fn wait_misses(
        &self,
        timeout: Duration,
        enough: impl FnMut(&[SeenMiss]) -> bool,
    ) -> Result<Vec<SeenMiss>> {
        self.channels.wait_seen(timeout, enough)
    }

    /// Tells the back-end what `iova` means without having been asked. Nothing happens if nothing is mapped there.
    pub fn tell_translation(&mut self, iova: u64) -> Result<()> {
        match self.iommu.as_ref().map(|iommu| iommu.lookup(iova, WRITE)) {
            Some(Lookup::Found(translation)) => self.channels.update(&mut self.channels.turn(), &translation),
            _ => Ok(()),
        }
    }

    // ---- raw ---------------------------------------------------------------------------------------------------

    /// Sends one message. The version bit is added to `flags`; replies are the caller's business.
    pub fn send(&self, number: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = message::header(number, message::VERSION | flags, payload.len()).to_vec();
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes, fds)
    }

    /// Sends bytes as they are, with descriptors: half a header, a wrong size, two messages at once.
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        send_bytes(self.channels.main(), bytes, fds)
    }

    /// Receives one message from the main channel.
    pub fn recv(&self, timeout: Duration) -> Result<Message> {
        recv_message(self.channels.main(), timeout)
    }

    /// Receives one of the back-end's own requests.
    pub fn recv_backend_request(&self, timeout: Duration) -> Result<Message> {
        match self.channels.backend() {
            Some(channel) => recv_message(&channel, timeout),
            None => Err(Error::Protocol {
                what: "there is no channel for requests of the back-end".into(),
            }),
        }
    }

    /// Sends a request and waits for the reply that carries its number.
    pub fn call(&mut self, number: u32, payload: &[u8]) -> Result<Message> {
        self.ask(number, 0, payload, &[])
    }

    /// Sends any message and waits for the reply that carries its number: to a request that is always answered, or to one
    /// with [`message::NEED_REPLY`] among its flags.
    pub fn ask(&self, number: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        self.channels
            .exchange(&mut self.channels.turn(), number, flags, payload, fds)
    }

    /// Waits until the back-end closed the connection; fails on a timeout.
    pub fn wait_closed(&self, timeout: Duration) -> Result<()> {
        loop {
            match self.recv(timeout) {
                Err(Error::Closed { .. }) => return Ok(()),
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Ok(());
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
    }

    /// Whether a protocol feature was negotiated.
    pub fn has(&self, mask: u64) -> bool {
        self.negotiated.protocol_features & mask == mask
    }

    fn call_u64(&mut self, number: u32) -> Result<u64> {
        let reply = self.call(number, &[])?;
        reply.u64().ok_or_else(|| Error::Protocol {
            what: format!(
                "{} answered {} bytes instead of 8",
                message::name(number),
                reply.payload.len()
            ),
        })
    }

    /// Sends a message that has no answer of its own, and waits for the acknowledgement if one is asked for.
    fn tell(&mut self, number: u32, payload: &[u8], fds: &[BorrowedFd<'_>], ack: Ack) -> Result<()> {
        let agreed = self.has(protocol_feature::REPLY_ACK);
        let wanted = match ack {
            Ack::Always => true,
            Ack::IfAgreed => agreed,
            Ack::AsProfile => agreed && self.profile.order == Order::RustVmm,
        };
        if !wanted {
            return self.send(number, 0, payload, fds);
        }
        accepted(self.ask(number, message::NEED_REPLY, payload, fds)?)
    }
}

impl Drop for FrontEnd {
    /// Others may hold the channels still: the driver for its INVALIDATEs, the thread that answers misses.
    fn drop(&mut self) {
        self.channels.hang_up();
    }
}

/// When a message asks for an acknowledgement.
#[derive(Clone, Copy)]
enum Ack {
    /// Whatever was negotiated.
    Always,
    /// Once REPLY_ACK was negotiated.
    IfAgreed,
    /// Once REPLY_ACK was negotiated, by front-ends that then ask for it everywhere.
    AsProfile,
}

fn single_region(region: &Region) -> Vec<u8> {
    let mut payload = vec![0; 8];
    payload.extend(message::memory_region(
        region.gpa(),
        region.size() as u64,
        region.user_addr(),
        0,
    ));
    payload
}
