//! What a VirtualMachineInstance says that matters here. KubeVirt's JSON is read leniently: what is missing or of another type
//! than expected says nothing, since the API grows and virt-launcher has checked it.

use std::fmt;

use serde_json::Value;

use super::domain::{Device, DeviceError};

/// Bytes of JSON that are read; etcd takes 1.5 MiB for an object.
const MAX_LENGTH: usize = 4 * 1024 * 1024;
/// Annotation: the PCI bus of the device, as `pcie.0`.
const BUS: &str = "vsock-sidecar.io/pci-bus";
/// Annotation: its address on the bus, as `0x10`.
const ADDRESS: &str = "vsock-sidecar.io/pci-address";

/// Why a VMI is refused.
#[derive(Debug, thiserror::Error)]
pub enum VmiError {
    /// Longer than is read.
    #[error("the VirtualMachineInstance is {length} bytes long, more than {MAX_LENGTH} are not read")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// No JSON.
    #[error("the VirtualMachineInstance is no JSON: {source}")]
    Malformed {
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It asks for the kernel's vsock, too.
    #[error(
        "the VirtualMachineInstance has autoattachVSOCK: true, and a guest takes one vsock: \
         remove spec.domain.devices.autoattachVSOCK"
    )]
    AutoattachVsock,
}

/// Something that works now and will not do later.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Warning {
    /// `evictionStrategy` wants a migration, which QEMU refuses with this device.
    Migrates {
        /// Its value.
        strategy: String,
    },
    /// An interface with masquerade and no list of ports takes all connections to the pod.
    TakesAllPorts {
        /// Its name.
        interface: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::Migrates { strategy } => write!(
                f,
                "evictionStrategy is {strategy}, and a virtual machine with a vhost-user vsock cannot be migrated: \
                 set it to None or External, or draining a node waits for ever"
            ),
            Warning::TakesAllPorts { interface } => write!(
                f,
                "interface {interface} has masquerade and no ports, so every TCP connection to the pod goes to the guest: \
                 list the guest's ports, without those of the sidecar's metrics and listeners"
            ),
        }
    }
}

/// What matters of a VMI.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Vmi {
    /// `namespace/name`.
    pub name: String,
    /// What the operator should know.
    pub warnings: Vec<Warning>,
    bus: Option<String>,
    address: Option<String>,
}

impl Vmi {
    /// Reads a VMI, and refuses one that has a vsock already.
    pub fn parse(json: &[u8]) -> Result<Vmi, VmiError> {
        if json.len() > MAX_LENGTH {
            return Err(VmiError::TooLong { length: json.len() });
        }
        let vmi: Value = serde_json::from_slice(json).map_err(|source| VmiError::Malformed { source })?;
        let text = |pointer: &str| vmi.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        if vmi.pointer("/spec/domain/devices/autoattachVSOCK") == Some(&Value::Bool(true)) {
            return Err(VmiError::AutoattachVsock);
        }
        let annotation = |key: &str| {
            let value = vmi.pointer("/metadata/annotations")?.get(key)?;
            Some(value.as_str()?.to_owned())
        };
        let strategy = text("/spec/evictionStrategy").filter(|value| value.starts_with("LiveMigrate"));
        let migrates = strategy.map(|strategy| Warning::Migrates { strategy });
        let interfaces = vmi
            .pointer("/spec/domain/devices/interfaces")
            .and_then(Value::as_array);
        let greedy = interfaces
            .into_iter()
            .flatten()
            .filter(|one| one.get("masquerade").is_some_and(Value::is_object))
            .filter(|one| {
                let ports = one.get("ports").and_then(Value::as_array);
                ports.is_none_or(Vec::is_empty)
            })
            .map(|one| Warning::TakesAllPorts {
                interface: one.get("name").and_then(Value::as_str).unwrap_or("?").to_owned(),
            });
        let name = text("/metadata/name").unwrap_or_default();
        let name = match text("/metadata/namespace") {
            Some(namespace) => format!("{namespace}/{name}"),
            None => name,
        };
        Ok(Vmi {
            name,
            warnings: migrates.into_iter().chain(greedy).collect(),
            bus: annotation(BUS),
            address: annotation(ADDRESS),
        })
    }

    /// The device where the annotations want it.
    pub(super) fn place(&self, mut device: Device) -> Result<Device, DeviceError> {
        if let Some(bus) = &self.bus {
            device = device.on_bus(bus)?;
        }
        if let Some(address) = &self.address {
            device = device.with_address(address)?;
        }
        Ok(device)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn warnings(json: &str) -> Vec<String> {
        let vmi = Vmi::parse(json.as_bytes()).unwrap();
        vmi.warnings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_kernels_vsock_is_refused_with_the_key_to_remove() {
        let error = Vmi::parse(br#"{"spec":{"domain":{"devices":{"autoattachVSOCK":true}}}}"#).unwrap_err();
        assert!(
            error.to_string().contains("spec.domain.devices.autoattachVSOCK"),
            "{error}"
        );
        Vmi::parse(br#"{"spec":{"domain":{"devices":{"autoattachVSOCK":false}}}}"#).unwrap();
    }

    #[test]
    fn an_eviction_by_migration_is_worth_a_warning() {
        for strategy in ["LiveMigrate", "LiveMigrateIfPossible"] {
            let said = warnings(&format!(r#"{{"spec":{{"evictionStrategy":"{strategy}"}}}}"#));
            assert!(said.len() == 1 && said[0].contains(strategy), "{said:?}");
        }
        for strategy in ["None", "External"] {
            let said = warnings(&format!(r#"{{"spec":{{"evictionStrategy":"{strategy}"}}}}"#));
            assert!(said.is_empty(), "{said:?}");
        }
    }

    #[test]
    fn masquerade_without_ports_is_worth_a_warning() {
        let of = |interface: &str| {
            warnings(&format!(
                r#"{{"spec":{{"domain":{{"devices":{{"interfaces":[{interface}]}}}}}}}}"#
            ))
        };
        for greedy in [
            r#"{"name":"default","masquerade":{}}"#,
            r#"{"name":"default","masquerade":{},"ports":[]}"#,
        ] {
            assert!(of(greedy)[0].contains("interface default"), "{greedy}");
        }
        assert!(of(r#"{"name":"default","masquerade":{},"ports":[{"port":22}]}"#).is_empty());
        assert!(of(r#"{"name":"default","bridge":{}}"#).is_empty());
    }

    #[test]
    fn what_is_of_another_type_than_expected_says_nothing() {
        for json in [
            "{}",
            "null",
            "[]",
            r#"{"metadata":7,"spec":"x"}"#,
            r#"{"metadata":{"name":["a"],"annotations":{"vsock-sidecar.io/pci-bus":1}}}"#,
            r#"{"spec":{"evictionStrategy":{},"domain":{"devices":{"autoattachVSOCK":"yes","interfaces":{}}}}}"#,
        ] {
            assert_eq!(Vmi::parse(json.as_bytes()).unwrap(), Vmi::default(), "{json}");
        }
    }

    #[test]
    fn what_is_no_json_is_an_error_however_deep() {
        let deep = "[".repeat(1 << 20);
        for json in ["", "{", "vmi", deep.as_str()] {
            assert!(matches!(
                Vmi::parse(json.as_bytes()),
                Err(VmiError::Malformed { .. })
            ));
        }
        let long = format!("\"{}\"", "x".repeat(MAX_LENGTH));
        assert!(matches!(
            Vmi::parse(long.as_bytes()),
            Err(VmiError::TooLong { .. })
        ));
    }

    #[test]
    fn annotations_place_the_device_on_a_bus() {
        let vmi = Vmi::parse(
            br#"{"metadata":{"name":"vm","namespace":"shop","annotations":{"vsock-sidecar.io/pci-bus":"pcie.0",
                "vsock-sidecar.io/pci-address":"0x10"}}}"#,
        )
        .unwrap();
        assert_eq!(vmi.name, "shop/vm");
        let device = vmi.place(Device::at(Path::new("/run/s")).unwrap()).unwrap();
        assert!(device.arguments()[3].ends_with(",bus=pcie.0,addr=0x10"));
        let sly =
            br#"{"metadata":{"annotations":{"vsock-sidecar.io/pci-bus":"pcie.0,romfile=/etc/passwd"}}}"#;
        let device = Device::at(Path::new("/run/s")).unwrap();
        Vmi::parse(sly).unwrap().place(device).unwrap_err();
    }
}
