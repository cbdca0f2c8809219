//! An AdmissionReview (`admission.k8s.io/v1`) and its answer. Bytes in, a value out.

use serde_json::{Value, json};

use super::inject::{Outcome, inject};
use super::settings::Settings;
use crate::terminal::escaped;

const API_VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// Most bytes of the names that are repeated in the log.
const MAX_NAME: usize = 253;

/// A review that has an answer.
#[derive(Clone, PartialEq, Debug)]
pub struct Reviewed {
    /// The AdmissionReview to send back.
    pub answer: Value,
    /// What became of the pod.
    pub verdict: Verdict,
    /// Namespace and name, as far as the pod has them yet.
    pub subject: Subject,
}

/// What became of a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It got the sidecar.
    Injected,
    /// It had it.
    Unchanged,
    /// It does not want it, or is no pod that is being made.
    NotSelected,
    /// It wants it and cannot have it.
    Refused(String),
}

/// Whom a review is about, for the log.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Subject {
    /// Namespace.
    pub namespace: String,
    /// Name, or what the name will begin with.
    pub name: String,
    /// Of the review.
    pub uid: String,
}

/// What is no review, or none of ours. The text goes to the API server with status 400.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadReview {
    /// No JSON.
    #[error("the body is no JSON: {0}")]
    NotJson(String),
    /// JSON that would fill the memory.
    #[error("the body has more than {MAX_VALUES} values, which is more than any pod has")]
    TooManyValues,
    /// JSON of another kind.
    #[error(
        "the body is no {KIND} of {API_VERSION} but has kind {kind} and apiVersion {version}: set admissionReviewVersions: [v1]"
    )]
    WrongKind {
        /// As it came.
        kind: String,
        /// As it came.
        version: String,
    },
    /// A part is missing or of the wrong kind.
    #[error("the review has no {field}, which is {expected}")]
    Missing {
        /// Where.
        field: &'static str,
        /// What belongs there.
        expected: &'static str,
    },
}

/// Most values in a review. The worst is an object of one field, 8 bytes that become some 700 in memory, and the pod is in memory
/// twice while it is changed: 35 MiB. A pod of 5000 environment variables, each with its managed fields, has as many.
const MAX_VALUES: usize = 50_000;

/// Judges a review.
///
/// # Errors
/// If the bytes are no review.
pub fn review(body: &[u8], settings: &Settings) -> Result<Reviewed, BadReview> {
    if values(body) > MAX_VALUES {
        return Err(BadReview::TooManyValues);
    }
    let review: Value =
        serde_json::from_slice(body).map_err(|error| BadReview::NotJson(error.to_string()))?;
    let (kind, version) = (review.get("kind"), review.get("apiVersion"));
    if kind != Some(&json!(KIND)) || version != Some(&json!(API_VERSION)) {
        let shown =
            |value: Option<&Value>| value.map_or("none".to_owned(), |value| short(&value.to_string()));
        return Err(BadReview::WrongKind {
            kind: shown(kind),
            version: shown(version),
        });
    }
    let missing = |field, expected| BadReview::Missing { field, expected };
    let request = review
        .get("request")
        .filter(|request| request.is_object())
        .ok_or(missing("request", "a map"))?;
    let uid = request
        .get("uid")
        .and_then(Value::as_str)
        .filter(|uid| !uid.is_empty() && uid.len() <= MAX_NAME)
        .ok_or(missing("request.uid", "what the answer is known by"))?;
    let operation = request
        .get("operation")
        .and_then(Value::as_str)
        .ok_or(missing("request.operation", "CREATE for what is to be injected"))?;
    let subject = Subject::of(request, uid);
    let reviewed = |answer: Value, verdict| Reviewed {
        answer,
        verdict,
        subject: subject.clone(),
    };
    if operation != "CREATE" || !is_pod(request) {
        let answer = allowed(
            uid,
            None,
            &["vsock-sidecar injects pods that are created; limit the webhook's rules to these".to_owned()],
        );
        return Ok(reviewed(answer, Verdict::NotSelected));
    }
    let pod = request
        .get("object")
        .filter(|pod| pod.is_object())
        .ok_or(missing("request.object", "the pod"))?;
    Ok(match inject(pod, settings) {
        Ok(Outcome::NotSelected { warning }) => {
            let warnings: Vec<String> = warning.into_iter().collect();
            reviewed(allowed(uid, None, &warnings), Verdict::NotSelected)
        }
        Ok(Outcome::Unchanged) => reviewed(allowed(uid, None, &[]), Verdict::Unchanged),
        Ok(Outcome::Injected { patched, warnings }) => {
            let patch = Value::Array(patched.operations().to_vec()).to_string();
            reviewed(allowed(uid, Some(&patch), &warnings), Verdict::Injected)
        }
        Err(refusal) => {
            let message = refusal.to_string();
            let answer = answer(json!({
                "uid": uid,
                "allowed": false,
                "status": {"code": refusal.code(), "message": message},
            }));
            reviewed(answer, Verdict::Refused(message))
        }
    })
}

/// How many values there are, or more: empty lists count twice. Of what is no JSON, any number; reading it ends at the first fault.
fn values(json: &[u8]) -> usize {
    let mut count = 0_usize;
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b',' | b'[' | b'{' => count = count.saturating_add(1),
            // A string: commas in scripts and annotations are no values.
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => drop(bytes.next()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    count
}

/// Whether the request is for a pod itself, and none of its sub-resources (`pods/binding`, `pods/ephemeralcontainers`).
fn is_pod(request: &Value) -> bool {
    let text = |pointer: &str| {
        request
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    text("/kind/group").is_empty()
        && text("/kind/kind") == "Pod"
        && text("/kind/version") == "v1"
        && text("/subResource").is_empty()
}

fn allowed(uid: &str, patch: Option<&str>, warnings: &[String]) -> Value {
    let mut response = json!({"uid": uid, "allowed": true});
    if let Some(fields) = response.as_object_mut() {
        if let Some(patch) = patch {
            fields.insert("patchType".to_owned(), json!("JSONPatch"));
            fields.insert("patch".to_owned(), json!(base64(patch.as_bytes())));
        }
        if !warnings.is_empty() {
            fields.insert("warnings".to_owned(), json!(warnings));
        }
    }
    answer(response)
}

fn answer(response: Value) -> Value {
    json!({"apiVersion": API_VERSION, "kind": KIND, "response": response})
}

impl Subject {
    fn of(request: &Value, uid: &str) -> Subject {
        let text = |pointer: &str| {
            let text = request
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default();
            short(text)
        };
        let name = [
            text("/object/metadata/name"),
            text("/object/metadata/generateName"),
        ];
        Subject {
            namespace: text("/namespace"),
            name: name.into_iter().find(|name| !name.is_empty()).unwrap_or_default(),
            uid: short(uid),
        }
    }
}

fn short(text: &str) -> String {
    escaped(&text.chars().take(MAX_NAME).collect::<String>())
}

/// Base64 with padding (RFC 4648, section 4): a byte slice in JSON as Go writes it.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3).saturating_mul(4));
    for chunk in bytes.chunks(3) {
        let group = (0..3).fold(0_u32, |sum, at| {
            sum << 8 | u32::from(chunk.get(at).copied().unwrap_or(0))
        });
        for at in 0..4 {
            let index = group >> (18 - 6 * at) & 0x3f;
            let digit = ALPHABET.get(index as usize).copied().unwrap_or(b'=');
            // One byte makes two digits, two make three.
            text.push(char::from(if at > chunk.len() { b'=' } else { digit }));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings::new("registry.example/vsock-sidecar:1").unwrap()
    }

    fn request(operation: &str, kind: &str, object: Value) -> Vec<u8> {
        let request = json!({
            "uid": "u-1", "operation": operation, "namespace": "shop",
            "kind": {"group": "", "version": "v1", "kind": kind}, "object": object,
        });
        json!({"apiVersion": API_VERSION, "kind": KIND, "request": request})
            .to_string()
            .into_bytes()
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
    }

    #[test]
    fn an_opted_in_pod_that_cannot_be_injected_is_refused_and_told_why() {
        let pod = json!({"metadata": {"name": "vm", "labels": {"vsock-sidecar.io/inject": "true"}},
            "spec": {"containers": [{"name": "qemu"}]}});
        let reviewed = review(&request("CREATE", "Pod", pod), &settings()).unwrap();
        let response = &reviewed.answer["response"];
        assert_eq!(
            (&response["allowed"], &response["uid"]),
            (&json!(false), &json!("u-1"))
        );
        assert_eq!(response["status"]["code"], json!(422));
        let message = response["status"]["message"].as_str().unwrap();
        assert!(message.contains("vsock-sidecar.io/config"), "{message}");
        assert_eq!(reviewed.verdict, Verdict::Refused(message.to_owned()));
        assert_eq!(
            (
                reviewed.subject.namespace.as_str(),
                reviewed.subject.name.as_str()
            ),
            ("shop", "vm")
        );
    }

    #[test]
    fn what_is_no_pod_that_is_made_is_let_through_with_a_warning() {
        let labelled = json!({"metadata": {"labels": {"vsock-sidecar.io/inject": "true"}}});
        for (operation, kind) in [("UPDATE", "Pod"), ("DELETE", "Pod"), ("CREATE", "Deployment")] {
            let reviewed = review(&request(operation, kind, labelled.clone()), &settings()).unwrap();
            assert_eq!(reviewed.verdict, Verdict::NotSelected);
            let response = &reviewed.answer["response"];
            assert_eq!(
                (&response["allowed"], response.get("patch")),
                (&json!(true), None)
            );
            assert!(response["warnings"][0].as_str().unwrap().contains("rules"));
        }
    }

    /// A script in an argument, or a manifest in an annotation, has more commas than any pod has values.
    #[test]
    fn commas_in_strings_are_no_values() {
        let script = "a,[{\"\\".repeat(20_000);
        let pod =
            json!({"metadata": {"annotations": {"script": script}}, "spec": {"containers": [{"name": "x"}]}});
        let reviewed = review(&request("CREATE", "Pod", pod), &settings()).unwrap();
        assert_eq!(reviewed.verdict, Verdict::NotSelected);
    }

    #[test]
    fn a_pod_of_thousands_of_variables_is_read() {
        let variable = |n: i32| json!({"name": format!("V{n}"), "value": "x"});
        let variables: Vec<Value> = (0..5000).map(variable).collect();
        let pod = json!({"metadata": {}, "spec": {"containers": [{"name": "x", "env": variables}]}});
        let reviewed = review(&request("CREATE", "Pod", pod), &settings()).unwrap();
        assert_eq!(reviewed.verdict, Verdict::NotSelected);
    }

    #[test]
    fn what_is_no_review_is_refused_with_its_reason() {
        let beta = json!({"apiVersion": "admission.k8s.io/v1beta1", "kind": KIND, "request": {}});
        let no_uid = json!({"apiVersion": API_VERSION, "kind": KIND, "request": {"operation": "CREATE"}});
        let no_request = json!({"apiVersion": API_VERSION, "kind": KIND, "request": []});
        let no_operation = json!({"apiVersion": API_VERSION, "kind": KIND, "request": {"uid": "u"}});
        let deep = "[".repeat(40_000);
        let wide = format!("[{}0]", "[],".repeat(40_000));
        for (body, word) in [
            (String::new(), "no JSON"),
            ("\u{0}\u{1b}[2J".to_owned(), "no JSON"),
            (deep, "no JSON"),
            (wide, "50000 values"),
            ("[]".to_owned(), "kind none"),
            (beta.to_string(), "v1beta1"),
            (no_request.to_string(), "request"),
            (no_uid.to_string(), "request.uid"),
            (no_operation.to_string(), "request.operation"),
            (
                String::from_utf8(request("CREATE", "Pod", json!(3))).unwrap(),
                "request.object",
            ),
        ] {
            let error = review(body.as_bytes(), &settings()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
