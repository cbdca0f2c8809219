//! What the calls of KubeVirt's hooks do.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Incoming;
use hyper::http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic_prost::ProstCodec;
use tracing::{info, warn};

use super::MAX_MESSAGE;
use super::messages::{
    CloudInit, Empty, HookPoint, InfoResult, MutateDomainRequest, MutateDomainResponse, OnDefineDomainParams,
    OnDefineDomainResult,
};
use crate::kubevirt::domain::Device;
use crate::kubevirt::{self, Warning};

/// The version of `Callbacks`. virt-launcher takes the newest that both know, and Shutdown came with this one.
const VERSION: &str = "v1alpha3";

/// Answers calls.
pub(super) struct Service {
    device: Device,
    shutdown: Box<dyn Fn() + Send + Sync>,
    /// What was warned of: a domain is defined more than once.
    warned: Mutex<BTreeSet<Warning>>,
}

impl Service {
    pub(super) fn new(device: Device, shutdown: impl Fn() + Send + Sync + 'static) -> Service {
        Service {
            device,
            shutdown: Box::new(shutdown),
            warned: Mutex::default(),
        }
    }

    /// One request of HTTP/2.
    pub(super) async fn answer(
        self: Arc<Service>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Infallible> {
        let path = request.uri().path().to_owned();
        Ok(match path.as_str() {
            "/kubevirt.hooks.info.Info/Info" => unary(request, |_: Empty| Ok(self.info())).await,
            "/kubevirt.hooks.v1alpha3.Callbacks/OnDefineDomain" => {
                unary(request, |asked: OnDefineDomainParams| {
                    let domain_xml = self.define("OnDefineDomain", &asked.domain_xml, &asked.vmi)?;
                    Ok(OnDefineDomainResult { domain_xml })
                })
                .await
            }
            // Not among our hook points, so nobody should call it; as it came is right all the same.
            "/kubevirt.hooks.v1alpha3.Callbacks/PreCloudInitIso" => {
                unary(request, |asked: CloudInit| {
                    Ok(CloudInit {
                        vmi: Vec::new(),
                        ..asked
                    })
                })
                .await
            }
            "/kubevirt.hooks.v1alpha3.Callbacks/Shutdown" => {
                unary(request, |_: Empty| {
                    info!("KubeVirt's hook Shutdown: the virtual machine is gone, draining");
                    (self.shutdown)();
                    Ok(Empty {})
                })
                .await
            }
            "/kubevirt.hooks.plugins.v1alpha1.DomainHookService/MutateDomain" => {
                unary(request, |asked: MutateDomainRequest| self.mutate(asked)).await
            }
            other => Status::unimplemented(format!("vsock-sidecar has no method {other}")).into_http(),
        })
    }

    fn info(&self) -> InfoResult {
        let point = |name: &str| HookPoint {
            name: name.to_owned(),
            priority: 0,
        };
        InfoResult {
            name: "vsock-sidecar".to_owned(),
            hook_points: vec![point("OnDefineDomain"), point("Shutdown")],
            versions: vec![VERSION.to_owned()],
        }
    }

    fn mutate(&self, asked: MutateDomainRequest) -> Result<MutateDomainResponse, Status> {
        // Another hypervisor's domain, should KubeVirt ever have one: as it came, and the log says so.
        if asked.domain_type != "libvirt" {
            warn!(
                kind = asked.domain_type,
                "a domain that is not libvirt's is left as it is: the guest will have no vsock"
            );
            return Ok(MutateDomainResponse { domain: asked.domain });
        }
        let domain = self.define("MutateDomain", &asked.domain, &asked.vmi)?;
        Ok(MutateDomainResponse { domain })
    }

    fn define(&self, call: &'static str, domain: &[u8], vmi: &[u8]) -> Result<Vec<u8>, Status> {
        match kubevirt::define(domain, vmi, &self.device) {
            Ok(defined) => {
                self.warn(&defined.name, defined.warnings);
                info!(
                    call,
                    vmi = defined.name,
                    socket = self.device.socket(),
                    changed = defined.changed,
                    "the domain has the vsock device"
                );
                Ok(defined.domain.into_bytes())
            }
            Err(error) => {
                warn!(call, %error, "the domain is refused, and the virtual machine will not start");
                let text = format!("vsock-sidecar: {error}");
                Err(match error.is_unreadable() {
                    true => Status::invalid_argument(text),
                    false => Status::failed_precondition(text),
                })
            }
        }
    }

    fn warn(&self, vmi: &str, warnings: Vec<Warning>) {
        /// Whoever calls decides what there is to be warned of.
        const MOST: usize = 64;
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in warnings {
            if warned.len() < MOST && !warned.contains(&warning) {
                warn!(vmi, "{warning}");
                warned.insert(warning);
            }
        }
    }
}

/// A call with one message each way.
async fn unary<Asked, Answer, Method>(request: Request<Incoming>, method: Method) -> Response<Body>
where
    Asked: prost::Message + Default + 'static,
    Answer: prost::Message + 'static,
    Method: FnOnce(Asked) -> Result<Answer, Status>,
{
    Grpc::new(ProstCodec::default())
        .max_decoding_message_size(MAX_MESSAGE)
        .unary(Once(Some(method)), request)
        .await
}

struct Once<Method>(Option<Method>);

impl<Asked, Answer, Method> UnaryService<Asked> for Once<Method>
where
    Method: FnOnce(Asked) -> Result<Answer, Status>,
{
    type Response = Answer;
    type Future = Ready<Result<tonic::Response<Answer>, Status>>;

    fn call(&mut self, request: tonic::Request<Asked>) -> Self::Future {
        let answer = self.0.take().map(|method| method(request.into_inner()));
        ready(
            answer
                .unwrap_or_else(|| Err(Status::internal("called twice")))
                .map(tonic::Response::new),
        )
    }
}
