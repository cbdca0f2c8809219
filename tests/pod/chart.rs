//! The chart's own pod and ConfigMap, as Helm renders them.

use std::path::PathBuf;

use serde_json::Value;

use crate::charts::{chart, documents, object, root, success, template};

/// What is rendered of `tests/pod/values.yaml` and more.
pub struct Rendered {
    /// The sample pod.
    pub pod: Value,
    /// The text of the ConfigMap's `config.yaml`.
    pub config: String,
}

/// Renders the chart, with another file of values of this directory and single values over it.
pub fn render(values: Option<&str>, set: &[&str]) -> Rendered {
    let here = |name: &str| root().join("tests/pod").join(name);
    let more: Option<PathBuf> = values.map(here);
    let more = more.map(|path| path.display().to_string());
    let mut arguments = Vec::new();
    if let Some(more) = &more {
        arguments.extend(["--values", more.as_str()]);
    }
    for value in set {
        arguments.extend(["--set", value]);
    }
    let text = success(
        template(&chart(), Some(&here("values.yaml")), &arguments),
        "helm template",
    );
    let objects = documents(&text);
    let config = &object(&objects, "ConfigMap", "-config")["data"]["config.yaml"];
    Rendered {
        pod: object(&objects, "Pod", "-sample-vm").clone(),
        config: config.as_str().expect("a text").to_owned(),
    }
}
