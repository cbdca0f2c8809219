//! Properties over generated configurations, damaged ones and noise.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};
use vsock_sidecar::config;

use super::schema::{validator, yaml};
use super::{Case, EXAMPLE, stderr};

/// Values that are put in the place of others to see what the parser makes of them.
fn strange_values() -> impl Strategy<Value = Value> {
    let known = prop::sample::select(vec![
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(-1),
        json!(65535),
        json!(4294967294u64),
        json!(4294967295u64),
        json!(1.5),
        json!(""),
        json!("a"),
        json!("A"),
        json!("1-2"),
        json!("01-2"),
        json!("1-0"),
        json!("5s"),
        json!("05s"),
        json!("0h"),
        json!("1MiB"),
        json!("1GiB"),
        json!("/a"),
        json!("/a/"),
        json!("/{cid}"),
        json!("tcp://a:1"),
        json!("tcp://a:01"),
        json!("tcp://127.0.0.1:1"),
        json!("tcp://999.0.0.1:1"),
        json!("tcp://[::1]:1"),
        json!("tcp://[x]:1"),
        json!("tcp://.:1"),
        json!("unix:///a"),
        json!("unix:///{port}"),
        json!("unix:///}"),
        json!("unix:///a/."),
        json!("vsock://1"),
        json!("vsock://2:1"),
        json!("vsock://02:1"),
        json!("vsock://4294967295:1"),
        json!("guest://guest-0"),
        json!("guest://guest-1:5"),
        json!("guest://-"),
        json!("seqpacket"),
        json!("length-prefixed"),
        json!("connect"),
        json!("v2"),
        json!("10.0.0.0/8"),
        json!("::1"),
        json!(["10.0.0.0/8", "::ffff:10.0.0.0/104"]),
        json!("server"),
        json!("text"),
        json!("info"),
        json!("a=info,warn"),
        json!([]),
        json!({}),
        json!([[]]),
        json!([{}]),
        json!("a\nb"),
        json!("/a\u{7}"),
        json!("é"),
    ]);
    prop_oneof![4 => known, 1 => any::<i64>().prop_map(|n| json!(n)), 1 => ".{0,20}".prop_map(|text| json!(text))]
}

/// Puts `value` in the place of the `index`-th node of `tree`, counted from the top; whether there was one.
fn replace(tree: &mut Value, index: &mut usize, value: &Value) -> bool {
    if *index == 0 {
        *tree = value.clone();
        return true;
    }
    *index -= 1;
    match tree {
        Value::Array(items) => items.iter_mut().any(|item| replace(item, index, value)),
        Value::Object(entries) => entries.values_mut().any(|entry| replace(entry, index, value)),
        _ => false,
    }
}

/// A kind of listener, before it has an address.
#[derive(Clone, Debug)]
enum Listen {
    Unix(config::SocketType),
    Tcp(Vec<config::Cidr>),
    Vsock,
}

/// A legal configuration.
fn configurations() -> impl Strategy<Value = config::Config> {
    use config::*;

    let name = "[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?";
    let path = "/[a-z]{1,10}/[ -z]{0,20}[a-z]";
    let millis = |range: std::ops::RangeInclusive<u64>| range.prop_map(Duration::from_millis);
    let target = prop_oneof![
        ("[a-z][a-z0-9]{0,9}(\\.[a-z]{2,5}){0,2}", 1..=65000u16)
            .prop_map(|(host, port)| Target::Tcp { host, port }),
        (any::<std::net::IpAddr>(), 1..=65000u16).prop_map(|(ip, port)| Target::Tcp {
            host: ip.to_string(),
            port
        }),
        path.prop_map(|path| Target::Unix { path }),
        path.prop_map(|path| Target::Unix {
            path: path + "{port}.{cid}"
        }),
        (0..=0xffff_fffeu32, 1..=0xffff_0000u32).prop_map(|(cid, port)| Target::Vsock { cid, port }),
        // The first guest's name stands for that of any other.
        prop::option::of(1..=0xffff_0000u32).prop_map(|port| Target::Guest {
            name: String::new(),
            port
        }),
    ];
    let proxied = prop_oneof![Just(None), Just(Some(ProxyProtocol::V2))];
    let cid = prop_oneof![
        Just(None),
        Just(Some(2)),
        Just(Some(2_000_003)),
        (4..1000u32).prop_map(Some)
    ];
    let connections = prop::option::of(1..=1_000_000usize);
    let framed = prop::option::of(1..=4096u32);
    let outbound = prop::collection::vec(
        (
            name,
            0..400u32,
            (cid, target),
            proxied,
            framed.clone(),
            connections.clone(),
        ),
        0..4,
    );
    let range = (any::<std::net::Ipv4Addr>(), 0..=32u8).prop_map(|(ip, prefix)| {
        let network = u64::from(ip.to_bits()) >> (32 - prefix) << (32 - prefix);
        let network = std::net::Ipv4Addr::from_bits(network as u32);
        Cidr::new(network.into(), prefix).expect("no bits behind the prefix")
    });
    let listen = prop_oneof![
        prop_oneof![Just(SocketType::Stream), Just(SocketType::Seqpacket)].prop_map(Listen::Unix),
        prop::collection::vec(range, 0..4).prop_map(Listen::Tcp),
        Just(Listen::Vsock),
    ];
    let inbound = prop::collection::vec(
        (
            name,
            prop::option::of(1..=0xffff_fffeu32),
            listen,
            any::<bool>(),
            framed,
            connections,
        ),
        0..4,
    );
    let limits = (
        (1..=1_000_000usize, 0..=1_000_000u32),
        (4096..=(16u32 << 20), (16u64 << 20)..=(1 << 40)),
        millis(1..=1999),
        millis(1..=3_600_000),
        (
            millis(0..=2_592_000_000),
            (0..=1000u64).prop_map(Duration::from_micros),
        ),
    );
    let guest = (outbound, inbound, limits, any::<bool>());
    let guests = prop::collection::vec(guest, 1..4);
    let total = (
        prop::option::of(1..=1_000_000usize),
        prop::option::of((1u64 << 20)..=(1 << 40)),
    );
    let confinement = prop_oneof![
        (
            prop::sample::select(vec![SeccompMode::Enforce, SeccompMode::Log, SeccompMode::Off]),
            prop::sample::select(vec![
                LandlockMode::Enforce,
                LandlockMode::Files,
                LandlockMode::Off
            ]),
        )
            .prop_map(|(seccomp, landlock)| Confinement {
                no_new_privileges: true,
                seccomp,
                landlock,
                paths: vec!["/run/vm".into()],
            }),
        Just(Confinement {
            no_new_privileges: false,
            seccomp: SeccompMode::Off,
            landlock: LandlockMode::Off,
            paths: Vec::new(),
        }),
    ];
    (
        guests,
        (millis(0..=3_600_000), millis(0..=3_600_000), any::<bool>()),
        any::<bool>(),
        0..3usize,
        confinement,
        total,
    )
        .prop_map(
            |(guests, (timeout, linger, require_session), text, admin, confinement, total)| {
                let count = guests.len();
                let unix = |name: String| ListenAddress::Unix(format!("/run/{name}").into());
                let guests =
                    guests
                        .into_iter()
                        .zip(0u32..)
                        .map(|((outbound, inbound, limits, server), n)| {
                            let mut next = 0;
                            let (
                                (connections, connections_per_second),
                                (buffer, memory),
                                connect_timeout,
                                guest_timeout,
                                (idle_timeout, busy_poll),
                            ) = limits;
                            Guest {
                                name: format!("guest-{n}"),
                                cid: 3 + n * 1_000_000,
                                vhost_user: VhostUser {
                                    socket: format!("/run/{n}.sock").into(),
                                    mode: if server {
                                        VhostUserMode::Server
                                    } else {
                                        VhostUserMode::Client
                                    },
                                    access_platform: AccessPlatform::Auto,
                                },
                                outbound: outbound
                                    .into_iter()
                                    .zip(0..)
                                    .map(
                                        |(
                                            (name, more, (cid, target), proxied, framed, connections),
                                            rule,
                                        )| {
                                            let ports = next + 1..=next + 1 + more;
                                            next = *ports.end();
                                            // Without another guest there is none to connect to.
                                            let other = if n == 0 { 1 } else { 0 };
                                            let target = match target {
                                                Target::Guest { .. } if count == 1 => {
                                                    Target::Vsock { cid: 2, port: 1 }
                                                }
                                                Target::Guest { port, .. } => Target::Guest {
                                                    name: format!("guest-{other}"),
                                                    port,
                                                },
                                                target => target,
                                            };
                                            let is_guest = matches!(target, Target::Guest { .. });
                                            let is_tcp = matches!(target, Target::Tcp { .. });
                                            let default = if is_guest { 3 + other * 1_000_000 } else { 2 };
                                            OutboundRule {
                                                name: format!("{name}-{rule}"),
                                                cid: cid
                                                    .filter(|cid| *cid != 3 + n * 1_000_000)
                                                    .unwrap_or(default),
                                                ports,
                                                target,
                                                proxy_protocol: proxied.filter(|_| !is_guest),
                                                framing: framed
                                                    .filter(|_| is_tcp)
                                                    .map(|max_message| Framing { max_message }),
                                                connections,
                                            }
                                        },
                                    )
                                    .collect(),
                                inbound: inbound
                                    .into_iter()
                                    .zip(0..)
                                    .map(
                                        |(
                                            (name, port, listen, wait_for_guest, framed, connections),
                                            rule,
                                        )| {
                                            let framing = framed.map(|max_message| Framing { max_message });
                                            let (listen, socket_type, allow, framing) = match listen {
                                                Listen::Unix(of) => {
                                                    // A CONNECT line comes over a stream.
                                                    let of =
                                                        if port.is_some() { of } else { SocketType::Stream };
                                                    let framing =
                                                        framing.filter(|_| of == SocketType::Stream);
                                                    (unix(format!("{n}.{rule}")), of, Vec::new(), framing)
                                                }
                                                Listen::Tcp(ranges) => {
                                                    let address = ([127, 0, 0, n as u8], 1000 + rule).into();
                                                    (
                                                        ListenAddress::Tcp(address),
                                                        SocketType::Stream,
                                                        ranges,
                                                        framing,
                                                    )
                                                }
                                                Listen::Vsock => {
                                                    let address =
                                                        ListenAddress::Vsock(1 + n * 100 + u32::from(rule));
                                                    (address, SocketType::Stream, Vec::new(), None)
                                                }
                                            };
                                            InboundRule {
                                                name: format!("{name}-{rule}"),
                                                listen,
                                                allow,
                                                wait_for_guest,
                                                socket_type,
                                                framing: framing.filter(|_| port.is_some()),
                                                connections,
                                                protocol: port.map_or(InboundProtocol::Connect, |port| {
                                                    InboundProtocol::Plain { port }
                                                }),
                                            }
                                        },
                                    )
                                    .collect(),
                                limits: Limits {
                                    connections,
                                    connections_per_second,
                                    buffer,
                                    memory,
                                    connect_timeout,
                                    guest_timeout,
                                    idle_timeout,
                                    busy_poll,
                                },
                            }
                        });
                Config {
                    admin: (0..admin).map(|n| unix(format!("admin.{n}"))).collect(),
                    log: Log {
                        format: if text { LogFormat::Text } else { LogFormat::Json },
                        level: "info".to_owned(),
                    },
                    drain: Drain { timeout, linger },
                    readiness: Readiness { require_session },
                    limits: SidecarLimits {
                        connections: total.0,
                        memory: total.1,
                    },
                    confinement,
                    guests: guests.collect(),
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Reading what `check` prints gives the same configuration.
    #[test]
    fn the_effective_configuration_means_the_same(config in configurations()) {
        let yaml = config.to_yaml().expect("YAML");
        match config::parse(&yaml, "again") {
            Ok((again, _)) => prop_assert_eq!(again, config),
            Err(error) => prop_assert!(false, "{}\n{}", error, yaml),
        }
    }

    /// An editor that follows the schema never marks a file that the program accepts.
    #[test]
    fn what_the_parser_accepts_the_schema_accepts(
        config in configurations(),
        index in 0..120usize,
        value in strange_values(),
    ) {
        thread_local! { static VALIDATOR: jsonschema::Validator = validator(); }
        let mut tree = yaml(&config.to_yaml().expect("YAML"));
        replace(&mut tree, &mut { index }, &value);
        // JSON is YAML.
        if config::parse(&tree.to_string(), "changed").is_ok() {
            prop_assert!(VALIDATOR.with(|validator| validator.is_valid(&tree)), "{}", tree);
        }
    }

    /// Text of YAML's own characters: an answer, no panic, and places that exist.
    #[test]
    fn any_text_gets_an_answer(text in "[-:\\[\\]{}&*!#|>'\"%@`?,<~ \t\r\nacdeghilmnoprstuvGU0-9./é\u{feff}\u{2028}]{0,200}") {
        let begin = Instant::now();
        if let Err(error) = config::parse(&text, "any") {
            prop_assert!(!error.diagnostics.is_empty());
            for diagnostic in &error.diagnostics {
                prop_assert!(!diagnostic.message.is_empty());
                if let (Some((line, _)), Some(excerpt)) = (diagnostic.position, &diagnostic.excerpt) {
                    prop_assert!(line >= 1 && excerpt.marked >= 1);
                    prop_assert!(excerpt.mark <= 120 && excerpt.text.chars().count() <= 120);
                }
            }
            prop_assert!(!error.to_string().is_empty());
        }
        prop_assert!(begin.elapsed() < Duration::from_secs(5));
    }

    /// A right file that lost, gained or changed a few bytes.
    #[test]
    fn a_damaged_file_gets_an_answer(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<char>(), any::<bool>()), 1..8)) {
        let mut text: Vec<char> = EXAMPLE.chars().collect();
        for (at, c, insert) in edits {
            let at = at.index(text.len());
            if insert { text.insert(at, c) } else { text[at] = c }
        }
        let text: String = text.into_iter().collect();
        if let Err(error) = config::parse(&text, "damaged") {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// The binary over any bytes: it checks or it explains.
    #[test]
    fn any_bytes_end_with_0_or_64(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let output = Case::new(bytes).check();
        prop_assert!(matches!(output.status.code(), Some(0 | 64)), "{}: {}", output.status, stderr(&output));
        prop_assert!(!stderr(&output).contains("panicked"));
    }
}
