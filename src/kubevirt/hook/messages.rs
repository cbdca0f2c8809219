//! The messages of KubeVirt's hooks, by the field numbers of its pkg/hooks/info, v1alpha3 and plugins/v1alpha1.
//!
//! Written by hand: there are few, and a compiler of protocol definitions is more than they are worth.

/// `kubevirt.hooks.info.InfoParams`, and every other message without fields.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Empty {}

/// `kubevirt.hooks.info.InfoResult`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InfoResult {
    /// For virt-launcher's log.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The calls that are wanted.
    #[prost(message, repeated, tag = "3")]
    pub hook_points: Vec<HookPoint>,
    /// Versions of `Callbacks`.
    #[prost(string, repeated, tag = "4")]
    pub versions: Vec<String>,
}

/// `kubevirt.hooks.info.HookPoint`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HookPoint {
    /// `OnDefineDomain`, `PreCloudInitIso` or `Shutdown`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Of two hooks, the one with the higher number is called first.
    #[prost(int32, tag = "2")]
    pub priority: i32,
}

/// `kubevirt.hooks.v1alpha3.OnDefineDomainParams`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OnDefineDomainParams {
    /// The domain.
    #[prost(bytes = "vec", tag = "1")]
    pub domain_xml: Vec<u8>,
    /// The VMI, JSON.
    #[prost(bytes = "vec", tag = "2")]
    pub vmi: Vec<u8>,
}

/// `kubevirt.hooks.v1alpha3.OnDefineDomainResult`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct OnDefineDomainResult {
    /// The domain.
    #[prost(bytes = "vec", tag = "1")]
    pub domain_xml: Vec<u8>,
}

/// `kubevirt.hooks.v1alpha3.PreCloudInitIsoParams`, and `PreCloudInitIsoResult`, which lacks the VMI.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CloudInit {
    /// CloudInitNoCloudSource, JSON.
    #[prost(bytes = "vec", tag = "1")]
    pub no_cloud_source: Vec<u8>,
    /// The VMI, JSON.
    #[prost(bytes = "vec", tag = "2")]
    pub vmi: Vec<u8>,
    /// CloudInitData, JSON.
    #[prost(bytes = "vec", tag = "3")]
    pub data: Vec<u8>,
}

/// `kubevirt.hooks.plugins.v1alpha1.MutateDomainRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MutateDomainRequest {
    /// `libvirt`.
    #[prost(string, tag = "1")]
    pub domain_type: String,
    /// The domain.
    #[prost(bytes = "vec", tag = "2")]
    pub domain: Vec<u8>,
    /// The VMI, JSON.
    #[prost(bytes = "vec", tag = "3")]
    pub vmi: Vec<u8>,
    /// Why it is called.
    #[prost(message, optional, tag = "4")]
    pub context: Option<SidecarContext>,
}

/// `kubevirt.hooks.plugins.v1alpha1.SidecarContext`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SidecarContext {
    /// `Boot`, `MigrationSource` or `MigrationTarget`.
    #[prost(string, tag = "1")]
    pub invocation: String,
}

/// `kubevirt.hooks.plugins.v1alpha1.MutateDomainResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MutateDomainResponse {
    /// The domain.
    #[prost(bytes = "vec", tag = "1")]
    pub domain: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// Bytes as Go's generated code has them; that what we write we can read says nothing.
    #[test]
    fn messages_have_the_fields_of_kubevirts_definitions() {
        let info = InfoResult {
            name: "n".into(),
            hook_points: vec![HookPoint {
                name: "S".into(),
                priority: 5,
            }],
            versions: vec!["v".into()],
        };
        assert_eq!(
            info.encode_to_vec(),
            b"\x0a\x01n\x1a\x05\x0a\x01S\x10\x05\x22\x01v"
        );
        let params = OnDefineDomainParams::decode(&b"\x0a\x02<d\x12\x01{"[..]).unwrap();
        assert_eq!((&params.domain_xml[..], &params.vmi[..]), (&b"<d"[..], &b"{"[..]));
        let cloud_init = CloudInit::decode(&b"\x0a\x01a\x12\x01b\x1a\x01c"[..]).unwrap();
        let parts = (&cloud_init.no_cloud_source, &cloud_init.vmi, &cloud_init.data);
        assert_eq!(parts, (&b"a".to_vec(), &b"b".to_vec(), &b"c".to_vec()));
        let request = b"\x0a\x07libvirt\x12\x01d\x1a\x01v\x22\x06\x0a\x04Boot\x2a\x01x";
        let asked = MutateDomainRequest::decode(&request[..]).unwrap();
        assert_eq!(
            (asked.domain_type.as_str(), &asked.domain[..]),
            ("libvirt", &b"d"[..])
        );
        assert_eq!(asked.vmi, b"v");
        assert_eq!(asked.context.unwrap().invocation, "Boot");
        let answer = MutateDomainResponse { domain: b"d".into() };
        assert_eq!(answer.encode_to_vec(), b"\x0a\x01d");
        Empty::decode(&b"\x0a\x01x"[..]).unwrap();
    }
}
