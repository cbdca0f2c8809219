//! values.schema.json: written by hand but for the sidecar's own schema, which `vsock-sidecar schema` prints.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Map, Value, json};

use super::tools::{chart, hold, success, vsock_sidecar};

/// What the definitions that come from the sidecar are called, `config` itself and `config.Guest` and so on.
const PREFIX: &str = "config";

/// values.schema.json as it stands.
pub fn schema() -> Value {
    let text = fs::read_to_string(chart().join("values.schema.json")).expect("values.schema.json");
    serde_json::from_str(&text).expect("JSON")
}

/// values.yaml as it stands.
pub fn values() -> Value {
    let text = fs::read_to_string(chart().join("values.yaml")).expect("values.yaml");
    serde_saphyr::from_str(&text).expect("YAML")
}

#[test]
fn the_schema_of_the_values_has_the_sidecars_own_schema_inside() {
    let mut schema = schema();
    let printed = success(vsock_sidecar(&["schema"], ""), "schema");
    let mut own: Value = serde_json::from_str(&printed).expect("JSON");
    // A Helm without network must resolve every reference, and editors do not all know `$id`: the definitions move, and the references.
    let parts = own
        .as_object_mut()
        .and_then(|own| own.shift_remove("$defs"))
        .expect("definitions");
    own.as_object_mut().expect("an object").shift_remove("$schema");

    let definitions = schema["$defs"].as_object_mut().expect("definitions");
    let of_sidecar = |name: &str| name == PREFIX || name.starts_with("config.");
    definitions.retain(|name, _| !of_sidecar(name));
    definitions.insert(PREFIX.to_owned(), moved(own));
    for (name, part) in parts.as_object().expect("definitions") {
        definitions.insert(format!("{PREFIX}.{name}"), moved(part.clone()));
    }
    let mut made = serde_json::to_string_pretty(&schema).expect("JSON");
    made.push('\n');
    hold(&chart().join("values.schema.json"), &made);
}

fn moved(schema: Value) -> Value {
    match schema {
        Value::Object(object) => {
            let object = object
                .into_iter()
                .map(|(key, value)| match (key.as_str(), value.as_str()) {
                    ("$ref", Some(to)) => {
                        let name = to
                            .strip_prefix("#/$defs/")
                            .expect("a reference within the schema");
                        (key, json!(format!("#/$defs/{PREFIX}.{name}")))
                    }
                    _ => (key, moved(value)),
                });
            Value::Object(object.collect::<Map<String, Value>>())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(moved).collect()),
        other => other,
    }
}

#[test]
fn the_schema_knows_every_key_of_the_values_and_no_other() {
    let schema = schema();
    assert!(jsonschema::meta::is_valid(&schema));
    let validator = jsonschema::draft202012::new(&schema).expect("a schema");
    let values = values();
    if let Err(error) = validator.validate(&values) {
        panic!("values.yaml: {}: {error}", error.instance_path());
    }
    let mut sections = BTreeMap::new();
    collect("", &schema, &mut sections);
    for (path, keys) in sections {
        let there = values
            .pointer(&path)
            .and_then(Value::as_object)
            .unwrap_or_else(|| panic!("values.yaml has {path}"));
        for key in keys {
            let helms_own = path.is_empty() && ["global", "vsock-sidecar-lib"].contains(&key.as_str());
            // An issuer is optional as a whole.
            let optional = path.ends_with("/issuerRef");
            assert!(
                helms_own || optional || there.contains_key(&key),
                "values.yaml has no {path}/{key}"
            );
        }
    }
}

/// The mappings that the schema spells out, with their keys. What it takes from elsewhere (`$ref`) is of Kubernetes or of the sidecar.
fn collect(path: &str, schema: &Value, sections: &mut BTreeMap<String, Vec<String>>) {
    let Some(properties) = schema["properties"].as_object() else {
        return;
    };
    assert_eq!(schema["additionalProperties"], false, "{path}");
    sections.insert(path.to_owned(), properties.keys().cloned().collect());
    for (key, property) in properties {
        if !(path.is_empty() && key == "vsock-sidecar-lib") {
            collect(&format!("{path}/{key}"), property, sections);
        }
    }
}
