//! What is wrong with a request, as far as can be told before the crate sees it.

use super::{Gate, MAX_REGIONS, QUEUES};
use crate::vhost_user::AccessPlatform;
use crate::vhost_user::features::{
    Features, PROTOCOL_F_BACKEND_REQ, PROTOCOL_F_CONFIG, PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    PROTOCOL_F_LOG_SHMFD, PROTOCOL_F_MQ, PROTOCOL_F_RESET_DEVICE, VIRTIO_F_ACCESS_PLATFORM, offered_features,
};
use crate::vhost_user::message::{
    Body, MAX_FDS, MemoryRegion, Message, REPLY, VERSION, request, request_index,
};
use crate::vhost_user::negotiation::MAX_QUEUE_SIZE;
use crate::vhost_user::translation::RingIovas;

impl Gate {
    /// What the crate will not like about a message, in words; `None` if nothing is known to be wrong.
    pub(super) fn fault(&self, message: &Message, fds: usize) -> Option<String> {
        let number = message.request();
        if request_index(number) == 0 {
            return Some("no such request is known".into());
        }
        if message.flags() & 3 != VERSION || message.flags() & !0xf != 0 {
            return Some(format!(
                "flags {:#x} are not those of protocol version 1",
                message.flags()
            ));
        }
        if message.flags() & REPLY != 0 {
            return Some("it is marked as an answer".into());
        }
        if let Some(bit) = needed_protocol_feature(number)
            && self.protocol_features & bit == 0
        {
            return Some(format!(
                "it needs the protocol feature {}, not acknowledged",
                Features::protocol(bit)
            ));
        }
        if fds > MAX_FDS {
            return Some(format!("{fds} descriptors came with it"));
        }
        match (number, message.request_body()) {
            (request::SET_OWNER, _) if self.owned => Some("the session has an owner already".into()),
            (request::SET_FEATURES, Body::U64(_)) => self.features_fault(message),
            (request::SET_MEM_TABLE, Body::MemoryTable(regions)) if regions.len() != fds => {
                Some(format!("{} regions and {fds} descriptors", regions.len()))
            }
            // To look addresses up in some regions only would be to guess what they are.
            (request::ADD_MEM_REG, _) if self.regions.len() >= MAX_REGIONS => {
                Some(format!("there are {MAX_REGIONS} memory regions already"))
            }
            (_, Body::VringState { index, .. } | Body::VringAddr { index, .. })
                if index as usize >= QUEUES =>
            {
                Some(format!("there is no virtqueue {index}"))
            }
            (_, Body::VringFd { index, .. }) if usize::from(index) >= QUEUES => {
                Some(format!("there is no virtqueue {index}"))
            }
            (_, Body::VringFd { has_fd, .. }) if usize::from(has_fd) != fds => {
                Some(format!("{fds} descriptors came with it"))
            }
            (request::SET_VRING_NUM, Body::VringState { num, .. })
                if num == 0 || num > MAX_QUEUE_SIZE.into() =>
            {
                Some(format!("{num} entries, 1 to {MAX_QUEUE_SIZE} are possible"))
            }
            (request::SET_VRING_ENABLE, Body::VringState { num, .. }) if num > 1 => {
                Some(format!("{num} is neither on nor off"))
            }
            (
                request::SET_VRING_ADDR,
                Body::VringAddr {
                    desc, used, avail, ..
                },
            ) => ring_addresses_fault(&self.regions, RingIovas { desc, avail, used }),
            (number, Body::Other) if has_fixed_body(number) => Some(format!(
                "a body of {} bytes is not what it has",
                message.body().len()
            )),
            (number, _) if !is_served(number) => Some("it is not served".into()),
            _ => None,
        }
    }

    /// What is wrong with the bits of SET_FEATURES.
    pub(super) fn features_fault(&self, message: &Message) -> Option<String> {
        let Body::U64(bits) = message.request_body() else {
            return None;
        };
        let unoffered = bits & !offered_features(self.policy);
        if unoffered == 0 {
            return None;
        }
        let option = match self.policy {
            AccessPlatform::Off if unoffered & VIRTIO_F_ACCESS_PLATFORM != 0 => {
                " (vhostUser.accessPlatform is off)"
            }
            _ => "",
        };
        Some(format!(
            "features were not offered: {}{option}",
            Features::virtio(unoffered)
        ))
    }
}

/// What is wrong with a ring's addresses if they are to be the VMM's.
pub(super) fn ring_addresses_fault(regions: &[MemoryRegion], addresses: RingIovas) -> Option<String> {
    let outside = [
        ("descriptor table", addresses.desc),
        ("used ring", addresses.used),
        ("available ring", addresses.avail),
    ]
    .into_iter()
    .find(|(_, address)| !regions.iter().any(|region| region.contains_user(*address)));
    outside.map(|(what, address)| format!("the {what} at {address:#x} is in no memory region"))
}

/// Requests with which a front-end begins to negotiate; none of them comes later in a session.
pub(super) fn begins_negotiation(number: u32) -> bool {
    matches!(
        number,
        request::GET_FEATURES | request::GET_PROTOCOL_FEATURES | request::SET_OWNER | request::RESET_OWNER
    )
}

/// Requests that [`Message::request_body`] has a value for whenever they are well-formed.
fn has_fixed_body(number: u32) -> bool {
    matches!(
        number,
        request::SET_FEATURES
            | request::SET_PROTOCOL_FEATURES
            | request::SET_MEM_TABLE
            | request::SET_VRING_NUM
            ..=request::SET_VRING_ERR
                | request::SET_VRING_ENABLE
                | request::GET_CONFIG
                | request::SET_CONFIG
                | request::ADD_MEM_REG
                | request::REM_MEM_REG
    )
}

fn is_served(number: u32) -> bool {
    has_fixed_body(number)
        || begins_negotiation(number)
        || matches!(
            number,
            request::SET_LOG_BASE
                | request::GET_QUEUE_NUM
                | request::SET_BACKEND_REQ_FD
                | request::RESET_DEVICE
                | request::GET_MAX_MEM_SLOTS
                | request::CHECK_DEVICE_STATE
                | request::SET_DEVICE_STATE_FD
        )
}

fn needed_protocol_feature(number: u32) -> Option<u64> {
    Some(match number {
        request::GET_QUEUE_NUM => PROTOCOL_F_MQ,
        request::SET_LOG_BASE => PROTOCOL_F_LOG_SHMFD,
        request::SET_BACKEND_REQ_FD => PROTOCOL_F_BACKEND_REQ,
        request::GET_CONFIG | request::SET_CONFIG => PROTOCOL_F_CONFIG,
        request::RESET_DEVICE => PROTOCOL_F_RESET_DEVICE,
        request::GET_MAX_MEM_SLOTS | request::ADD_MEM_REG | request::REM_MEM_REG => {
            PROTOCOL_F_CONFIGURE_MEM_SLOTS
        }
        _ => return None,
    })
}
