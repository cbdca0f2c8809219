//! The JSON Schema, judged by an independent validator, and the reference that is made of it.

use std::path::Path;

use serde_json::{Value, json};
use vsock_sidecar::config;

use super::{EXAMPLE, vsock_sidecar};

/// What the binary prints.
fn schema() -> Value {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let output = vsock_sidecar(dir.path(), &["schema"]);
    assert_eq!(output.status.code(), Some(0));
    serde_json::from_slice(&output.stdout).expect("the schema is JSON")
}

pub fn validator() -> jsonschema::Validator {
    jsonschema::draft202012::new(&schema()).expect("the schema is a schema")
}

pub fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).expect("YAML")
}

#[test]
fn the_schema_is_of_draft_2020_12_and_describes_every_key() {
    let schema = schema();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert!(jsonschema::meta::is_valid(&schema));
    for (section, object) in sections(&schema) {
        assert_eq!(object["additionalProperties"], false, "{section}");
        for (key, property) in object["properties"].as_object().expect("properties") {
            assert!(
                property["description"]
                    .as_str()
                    .is_some_and(|text| text.len() > 10),
                "{section}.{key}"
            );
            let leaf = property.get("$ref").is_none() && property["items"].get("$ref").is_none();
            let examples = property["examples"].as_array();
            assert_eq!(
                leaf,
                examples.is_some(),
                "{section}.{key}: a scalar has an example"
            );
            let of_key = jsonschema::draft202012::new(property).ok();
            for example in examples.into_iter().flatten().chain(property.get("default")) {
                assert!(
                    !leaf || of_key.as_ref().is_some_and(|schema| schema.is_valid(example)),
                    "{section}.{key}: {example}"
                );
            }
        }
    }
}

/// What the schema can say, it says as the parser does.
#[test]
fn schema_and_parser_agree_on_the_shape() {
    let validator = validator();
    let example = EXAMPLE.replace("DIR", "/tmp");
    assert!(validator.is_valid(&yaml(&example)));

    let guest =
        |extra: &str| format!("guests: [{{name: web, cid: 3, vhostUser: {{socket: /tmp/web.sock}}{extra}}}]");
    let right = [
        guest(""),
        guest(", outbound: [], inbound: []"),
        guest(", vhostUser: {socket: /tmp/a, mode: client}").replacen(
            "vhostUser: {socket: /tmp/web.sock}, ",
            "",
            1,
        ),
        guest(", outbound: [{port: 4294967294, to: 'tcp://[::1]:65535'}]"),
        guest(", outbound: [{ports: 1-4294967294, to: 'unix:///run/{cid}/{port}'}]"),
        guest(", outbound: [{port: 1, to: 'tcp://my_db.example.:1'}]"),
        guest(", outbound: [{port: 1, to: 'unix:///a', proxyProtocol: v2}]"),
        guest(", inbound: [{listen: 'tcp://[2001:db8::1]:443', port: 1}]"),
        guest(", outbound: [{port: 1, cid: 9, to: 'vsock://0:4294967294'}]"),
        guest(
            ", outbound: [{ports: 1-9, cid: 2, to: 'vsock://4294967294:1', proxyProtocol: v2, connections: 7}]",
        ),
        guest(", outbound: [{port: 1, to: 'tcp://a:1', framing: length-prefixed, maxMessage: 1}]"),
        guest(", outbound: [{port: 1, to: guest://db}, {port: 1, cid: 2, to: 'guest://db:2'}]").replace(
            "}]}]",
            "}]}, {name: db, cid: 4, vhostUser: {socket: /tmp/db.sock}}]",
        ),
        guest(", inbound: [{listen: 'unix:///a', protocol: connect, socketType: stream, connections: 1}]"),
        guest(", inbound: [{listen: 'unix:///a', port: 1, socketType: seqpacket}]"),
        guest(", inbound: [{listen: 'unix:///a', port: 1, framing: length-prefixed, maxMessage: 256KiB}]"),
        guest(", inbound: [{listen: vsock://4294967294, port: 1}, {listen: vsock://1, protocol: connect}]"),
        guest(", inbound: [{listen: 'unix:///a', port: 1, waitForGuest: true}]"),
        // Each family has its own listener.
        guest(", inbound: [{listen: 'tcp://[::]:1', port: 1}, {listen: tcp://0.0.0.0:1, port: 1}]"),
        format!(
            "admin: {{listen: ['tcp://[::]:1', tcp://127.0.0.1:1]}}\n{}",
            guest(", inbound: [{listen: tcp://127.0.0.2:1, port: 1}]")
        ),
        guest(
            ", inbound: [{listen: 'tcp://[::]:1', port: 1, allow: [10.0.0.0/8, 'FD00::/8', '::1', 192.0.2.7, '::ffff:0:0/96']}]",
        ),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, allow: ['::/0', 0.0.0.0/0]}]"),
        guest(", limits: {buffer: 65536, idleTimeout: 12h}"),
        guest(", limits: {buffer: 4096, memory: 4KiB, connectionsPerSecond: 0}"),
        guest(", limits: {connectionsPerSecond: 1000000, memory: 1024GiB}"),
        format!("limits: {{}}\n{}", guest("")),
        format!("limits: {{connections: 1, memory: 1048576}}\n{}", guest("")),
        format!(
            "log: {{format: text, level: 'warn,vsock_sidecar::host=trace'}}\n{}",
            guest("")
        ),
        format!(
            "admin: {{}}\nlog: {{}}\ndrain: {{}}\nconfinement: {{}}\n{}",
            guest("")
        ),
        format!(
            "confinement: {{noNewPrivileges: true, seccomp: log, landlock: files}}\n{}",
            guest("")
        ),
        format!(
            "confinement: {{noNewPrivileges: false, seccomp: 'off', landlock: 'off'}}\n{}",
            guest("")
        ),
    ];
    for text in right {
        config::parse(&text, "right").unwrap_or_else(|error| panic!("{text}\n{error}"));
        assert!(validator.is_valid(&yaml(&text)), "the schema refuses {text}");
    }
    let wrong = [
        "{}".to_owned(),
        "guests: []".to_owned(),
        "guests: [{}]".to_owned(),
        "guests: {}".to_owned(),
        guest(", turbo: 1"),
        guest(", limits: null"),
        guest(", limits: {connections: 1000001}"),
        guest(", limits: {connections: many}"),
        guest(", limits: {connectionsPerSecond: 1000001}"),
        guest(", limits: {memory: lots}"),
        format!("limits: {{buffer: 4KiB}}\n{}", guest("")),
        format!("limits: {{connections: 0}}\n{}", guest("")),
        guest(", limits: {buffer: 1 MiB}"),
        guest(", limits: {idleTimeout: 5}"),
        guest(", limits: {idleTimeout: 5 s}"),
        guest(", outbound: [{to: 'tcp://a:1'}]"),
        guest(", outbound: [{port: 1, ports: 1-2, to: 'tcp://a:1'}]"),
        guest(", outbound: [{port: 0, to: 'tcp://a:1'}]"),
        guest(", outbound: [{port: '1', to: 'tcp://a:1'}]"),
        guest(", outbound: [{ports: 1, to: 'tcp://a:1'}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:65536'}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:0'}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a'}]"),
        guest(", outbound: [{port: 1, to: 'unix://a'}]"),
        guest(", outbound: [{port: 1, to: 'unix:///a{b}'}]"),
        guest(", outbound: [{port: 1, to: 'guest://A'}]"),
        guest(", outbound: [{port: 1, to: 'guest://'}]"),
        guest(", outbound: [{port: 1, to: 'guest://a:0'}]"),
        guest(", outbound: [{port: 1, to: 'vsock://2'}]"),
        guest(", outbound: [{port: 1, to: 'vsock://host:1'}]"),
        guest(", outbound: [{port: 1, to: 'vsock://2:0'}]"),
        guest(", outbound: [{port: 1, cid: 1, to: 'tcp://a:1'}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:1', framing: newlines}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:1', connections: 0}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:1', socketType: stream}]"),
        guest(", inbound: [{listen: 'unix:///a', port: 1, socketType: dgram}]"),
        guest(", inbound: [{listen: 'vsock://0', port: 1}]"),
        guest(", inbound: [{listen: 'vsock://2:1', port: 1}]"),
        guest(", inbound: [{listen: 'guest://a', port: 1}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:1', proxyProtocol: v1}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:1', proxyProtocol: 2}]"),
        guest(", outbound: [{port: 1, to: 'tcp://a:1', proxyProtocol: true}]"),
        guest(", inbound: [{listen: 'tcp://localhost:1', port: 1}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1'}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, allow: []}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, allow: 10.0.0.0/8}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, allow: [10.0.0.0/33]}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, allow: [localhost]}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, waitForGuest: 5s}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, waitForGuest: 'true'}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', port: 1, protocol: connect}]"),
        guest(", inbound: [{listen: 'tcp://127.0.0.1:1', protocol: plain}]"),
        guest("").replace("web,", "Web,"),
        guest("").replace("web,", &format!("{},", "w".repeat(64))),
        guest("").replace("cid: 3", "cid: 2"),
        guest("").replace("cid: 3", "cid: 4294967295"),
        guest("").replace("/tmp/web.sock", "web.sock"),
        guest("").replace("/tmp/web.sock", "/tmp/"),
        format!("log: {{level: loud}}\n{}", guest("")),
        format!("log: {{format: xml}}\n{}", guest("")),
        format!("admin: {{listen: tcp://127.0.0.1:1}}\n{}", guest("")),
        format!("drain: 25s\n{}", guest("")),
        format!("confinement: off\n{}", guest("")),
        format!("confinement: {{seccomp: kill}}\n{}", guest("")),
        format!("confinement: {{landlock: true}}\n{}", guest("")),
    ];
    for text in wrong {
        assert!(
            config::parse(&text, "wrong").is_err(),
            "the parser accepts {text}"
        );
        assert!(!validator.is_valid(&yaml(&text)), "the schema accepts {text}");
    }
}

/// The objects of the schema with the names under which the reference lists them, in its order.
fn sections(schema: &Value) -> Vec<(&'static str, &Value)> {
    let of = |name: &str| &schema["$defs"][name];
    vec![
        ("The file", schema),
        ("`admin`", of("Admin")),
        ("`log`", of("Log")),
        ("`drain`", of("Drain")),
        ("`limits`", of("SidecarLimits")),
        ("`readiness`", of("Readiness")),
        ("`confinement`", of("Confinement")),
        ("`guests[]`", of("Guest")),
        ("`guests[].vhostUser`", of("VhostUser")),
        ("`guests[].outbound[]`", of("Outbound")),
        ("`guests[].inbound[]`", of("Inbound")),
        ("`guests[].limits`", of("Limits")),
    ]
}

/// `docs/configuration.md` holds the reference between two marks; it is made of the schema here, and this fails when
/// the two differ. `UPDATE_DOCS=1 cargo test --test config` writes it.
#[test]
fn the_reference_is_that_of_the_schema() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let document = std::fs::read_to_string(&path).expect("docs/configuration.md");
    let (begin, end) = (
        "<!-- begin: made of the JSON Schema by tests/config/schema.rs -->\n",
        "<!-- end -->",
    );
    let (head, rest) = document.split_once(begin).expect("the first mark");
    let (_, tail) = rest.split_once(end).expect("the second mark");
    let expected = format!("{head}{begin}{}{end}{tail}", reference(&schema()));
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, expected).expect("docs/configuration.md can be written");
        return;
    }
    assert!(
        document == expected,
        "docs/configuration.md is stale: run UPDATE_DOCS=1 cargo test --test config"
    );
}

fn reference(schema: &Value) -> String {
    let mut text = String::new();
    for (title, object) in sections(schema) {
        let one_line = |value: &Value| value.as_str().unwrap_or_default().replace('\n', " ");
        text += &format!("\n### {title}\n\n{}\n\n", one_line(&object["description"]));
        text += "| Key | Type and bounds | Default | Example | Meaning |\n|---|---|---|---|---|\n";
        let required: Vec<&str> = object["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let properties = object["properties"].as_object().expect("properties");
        for (key, property) in properties {
            let is_leaf = property.get("$ref").is_none() && property["items"].get("$ref").is_none();
            let default = match property.get("default") {
                _ if required.contains(&key.as_str()) => "required".to_owned(),
                None => String::new(),
                Some(default) if is_leaf || default == &json!([]) => format!("`{}`", plain(default)),
                Some(_) => "its keys' defaults".to_owned(),
            };
            let example = property["examples"]
                .get(0)
                .map(|example| format!("`{key}: {}`", plain(example)));
            let row = [
                format!("`{key}`"),
                kind(property),
                default,
                example.unwrap_or_default(),
                one_line(&property["description"]),
            ];
            text += &format!(
                "| {} |\n",
                row.join(" | ").replace("|  |", "| |").replace("|  |", "| |")
            );
        }
    }
    text + "\n"
}

/// A value as one writes it in YAML.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) if text.contains('{') => format!("\"{text}\""),
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(plain).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

/// The type of a property and its bounds.
fn kind(property: &Value) -> String {
    let reference = |value: &Value| value["$ref"].as_str()?.rsplit('/').next().map(str::to_lowercase);
    if property.get("$ref").is_some() {
        return "mapping".to_owned();
    }
    if let Some(choices) = property["oneOf"].as_array() {
        let words: Vec<_> = choices
            .iter()
            .map(|choice| format!("`{}`", plain(&choice["const"])))
            .collect();
        return words.join(" or ");
    }
    if property["anyOf"].is_array() {
        return "size: bytes, or with `KiB`, `MiB`, `GiB`".to_owned();
    }
    match property["type"].as_str() {
        Some("integer") => format!("number, {} to {}", property["minimum"], property["maximum"]),
        Some("boolean") => "`true` or `false`".to_owned(),
        Some("array") => {
            let is_range = property["items"]["pattern"]
                .as_str()
                .is_some_and(|pattern| pattern.contains("3[0-2]"));
            let scalar = if is_range { "address ranges" } else { "addresses" };
            let of =
                reference(&property["items"]).map_or(scalar.to_owned(), |name| format!("`{name}` mappings"));
            match (property.get("minItems"), property.get("maxItems")) {
                (Some(min), Some(max)) => format!("list of {of}, {min} to {max}"),
                (_, Some(max)) => format!("list of {of}, at most {max}"),
                _ => format!("list of {of}"),
            }
        }
        _ if property["pattern"]
            .as_str()
            .is_some_and(|pattern| pattern.contains("(ms|s|m|h)")) =>
        {
            "duration: a number and `ms`, `s`, `m` or `h`".to_owned()
        }
        _ => match property.get("maxLength") {
            Some(max) => format!("text, at most {max} bytes"),
            None => "text".to_owned(),
        },
    }
}
