//! Domains before and after, and what must not get past.

use std::borrow::Cow;
use std::path::Path;

use proptest::prelude::*;

use super::*;

const SOCKET: &str = "/var/run/kubevirt-plugin/vsock-sidecar/vsock.sock";

fn device() -> Device {
    Device::at(Path::new(SOCKET)).unwrap()
}

#[track_caller]
fn edited(xml: &str) -> String {
    let once = match edit(xml.as_bytes(), &device()) {
        Ok(once) => once.into_owned(),
        Err(error) => panic!("{error}\n{xml}"),
    };
    let twice = edit(once.as_bytes(), &device()).unwrap();
    assert!(
        matches!(twice, Cow::Borrowed(_)),
        "twice is more than once:\n{twice}"
    );
    once
}

#[track_caller]
fn conflict(xml: &str) -> Conflict {
    match edit(xml.as_bytes(), &device()) {
        Err(DomainError::Conflict(conflict)) => conflict,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn malformed(xml: &str) -> (usize, String) {
    match edit(xml.as_bytes(), &device()) {
        Err(DomainError::Malformed { line, why }) => (line, why),
        other => panic!("{other:?}\n{xml}"),
    }
}

#[test]
fn a_bare_domain_gets_shared_memory_and_the_device() {
    let before = "<domain type='kvm'>\n  <name>vm</name>\n</domain>\n";
    let after = "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm</name>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <qemu:commandline>
    <qemu:arg value='-chardev'/>
    <qemu:arg value='socket,id=vsocksidecar0,path=/var/run/kubevirt-plugin/vsock-sidecar/vsock.sock'/>
    <qemu:arg value='-device'/>
    <qemu:arg value='vhost-user-vsock-pci-non-transitional,id=vsocksidecar0-dev,chardev=vsocksidecar0'/>
  </qemu:commandline>
</domain>
";
    assert_eq!(edited(before), after);
}

#[test]
fn other_arguments_of_qemu_stay_and_come_first() {
    let before = "<domain xmlns:qemu=\"http://libvirt.org/schemas/domain/qemu/1.0\">
\t<memoryBacking>
\t\t<hugepages></hugepages>
\t\t<source type=\"memfd\"></source>
\t\t<access mode=\"shared\"></access>
\t</memoryBacking>
\t<qemu:commandline>
\t\t<qemu:arg value=\"-fw_cfg\"></qemu:arg>
\t\t<qemu:arg value=\"name=opt/com.coreos/config,file=/var/run/ignition\"></qemu:arg>
\t</qemu:commandline>
</domain>";
    let after = edited(before);
    let added: String = device()
        .arguments()
        .iter()
        .map(|argument| format!("\n\t\t<qemu:arg value='{argument}'/>"))
        .collect();
    let end = "\n\t</qemu:commandline>";
    assert_eq!(after, before.replace(end, &format!("{added}{end}")));
}

#[test]
fn private_memory_becomes_shared_wherever_it_says_so() {
    let after = edited(
        "<domain type='kvm'><memoryBacking><hugepages><page size='2' unit='M'/></hugepages><nosharepages/>\
         <source type='anonymous'/><access mode=\"private\"/><allocation mode='immediate'/></memoryBacking>\
         <cpu><numa><cell id='0' cpus='0' memory='512' memAccess=\"private\"/><cell id='1' memAccess='shared'/>\
         <cell id='2'/></numa></cpu>\
         <devices><memory model='virtio-mem' access='private'><target/></memory></devices></domain>",
    );
    for part in [
        "<hugepages><page size='2' unit='M'/></hugepages><nosharepages/>",
        "<source type='memfd'/><access mode=\"shared\"/><allocation mode='immediate'/></memoryBacking>",
        "memory='512' memAccess=\"shared\"/><cell id='1' memAccess='shared'/><cell id='2'/>",
        "<memory model='virtio-mem' access='shared'>",
    ] {
        assert!(after.contains(part), "{part} is not in\n{after}");
    }
}

#[test]
fn what_is_left_out_in_memory_backing_is_added() {
    for (before, after) in [
        (
            "<memoryBacking/>",
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        ),
        (
            "<memoryBacking />",
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
        ),
        (
            "<memoryBacking><hugepages/></memoryBacking>",
            "<memoryBacking><hugepages/><source type='memfd'/><access mode='shared'/></memoryBacking>",
        ),
        (
            "<memoryBacking><access></access><source/></memoryBacking>",
            "<memoryBacking><access mode='shared'></access><source type='memfd'/></memoryBacking>",
        ),
        (
            "<memoryBacking><source type='file'/></memoryBacking>",
            "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>",
        ),
        (
            "<memoryBacking><source type=\"anon&#121;mous\"/></memoryBacking>",
            "<memoryBacking><source type=\"memfd\"/><access mode='shared'/></memoryBacking>",
        ),
    ] {
        let result = edited(&format!("<domain>{before}</domain>"));
        assert!(result.contains(&format!(">{after}<qemu")), "{before}: {result}");
    }
}

#[test]
fn what_it_does_not_know_stays_byte_for_byte() {
    let odd = "<?xml version=\"1.0\" encoding='UTF-8'?>\r\n<!-- a -> b -->\r\n<?stylesheet x='1'?>\r\n";
    let inner = "\r\n  <name  >a&amp;b&#x41;</name >\r\n  <description><![CDATA[<domain><vsock/> ]] ]]></description>\r\n\
                 <metadata><k:v xmlns:k=\"http://kubevirt.io\" a='\"' b=\"'\">\u{fc}\u{1f600}</k:v>\
                 <kubevirt xmlns='http://kubevirt.io'><memoryBacking/><devices><vsock/></devices></kubevirt></metadata>\t\r\n";
    let before = format!("{odd}<domain\n\ttype = \"kvm\"\r\n>{inner}</domain >\r\n<!-- end -->\n");
    let after = edited(&before);
    assert!(after.starts_with(odd), "{after}");
    assert!(after.contains(inner.trim_end()), "{after}");
    assert!(
        after.ends_with("\t\r\n</domain >\r\n<!-- end -->\n")
            || after.ends_with("\r\n</domain >\r\n<!-- end -->\n")
    );
    // Windows' ends of lines where the document has them.
    assert!(after.contains("</metadata>\r\n  <memoryBacking>\r\n"), "{after}");
}

#[test]
fn a_byte_order_mark_stays_and_moves_no_edit() {
    let with = edited("\u{feff}<domain><memoryBacking><access mode='private'/></memoryBacking></domain>");
    let without = edited("<domain><memoryBacking><access mode='private'/></memoryBacking></domain>");
    assert_eq!(with, format!("\u{feff}{without}"));
}

#[test]
fn the_namespace_is_used_as_it_is_declared() {
    let uri = "http://libvirt.org/schemas/domain/qemu/1.0";
    // Another prefix.
    let after = edited(&format!("<domain xmlns:q='{uri}'/>"));
    assert!(
        after.contains("<q:commandline><q:arg value='-chardev'/>"),
        "{after}"
    );
    // The customary prefix for something else.
    let after = edited("<domain xmlns:qemu='urn:other'/>");
    assert!(
        after.contains(&format!("<qemu:commandline xmlns:qemu='{uri}'>")),
        "{after}"
    );
    // On the element itself, as the default.
    let after = edited(&format!(
        "<domain><commandline xmlns='{uri}'><arg value='-S'/></commandline></domain>"
    ));
    assert!(
        after.contains("<arg value='-S'/><arg value='-chardev'/>"),
        "{after}"
    );
    // An element that only looks like it.
    let after =
        edited("<domain><commandline xmlns='urn:other'><arg value='-chardev'/></commandline></domain>");
    assert!(after.contains("<qemu:arg value='-chardev'/>"), "{after}");
}

#[test]
fn a_path_is_written_for_qemu_and_for_xml() {
    let sly = Device::at(Path::new("/run/a,b'&<c>\"/s")).unwrap();
    let after = edit(b"<domain/>", &sly).unwrap().into_owned();
    assert!(
        after.contains("path=/run/a,,b&apos;&amp;&lt;c&gt;\"/s'"),
        "{after}"
    );
    assert!(matches!(edit(after.as_bytes(), &sly).unwrap(), Cow::Borrowed(_)));
}

#[test]
fn the_device_goes_where_it_is_put_and_is_known_wherever_it_is() {
    let placed = device().on_bus("pcie.0").unwrap().with_address("0x10").unwrap();
    let after = edit(b"<domain/>", &placed).unwrap().into_owned();
    assert!(
        after.contains(",chardev=vsocksidecar0,bus=pcie.0,addr=0x10'/>"),
        "{after}"
    );
    assert!(matches!(
        edit(after.as_bytes(), &device()).unwrap(),
        Cow::Borrowed(_)
    ));
    for wrong in ["", "pcie 0", "pcie.0,id=x", &"b".repeat(65)] {
        device().on_bus(wrong).unwrap_err();
    }
    for wrong in ["", "0x", "20", "0x20", "1.8", "1.", ".1", "+1", "1,x", "0x1.0x1"] {
        device().with_address(wrong).unwrap_err();
    }
    for right in ["0x10", "10", "1f.7", "0"] {
        device().with_address(right).unwrap();
    }
}

#[test]
fn paths_that_qemu_could_not_use_are_refused() {
    for wrong in ["", "vsock.sock", "/a\nb", &format!("/{}", "a".repeat(107))] {
        Device::at(Path::new(wrong)).unwrap_err();
    }
    Device::at(Path::new(&format!("/{}", "a".repeat(106)))).unwrap();
}

/// A domain with these arguments of QEMU.
fn with_arguments(arguments: &[&str]) -> String {
    let arguments: String = arguments
        .iter()
        .map(|argument| format!("<qemu:arg value='{argument}'/>"))
        .collect();
    format!("<domain xmlns:qemu='{QEMU_NAMESPACE}'><qemu:commandline>{arguments}</qemu:commandline></domain>")
}

#[test]
fn a_second_vsock_is_refused() {
    assert_eq!(
        conflict("<domain><devices><vsock model='virtio'><cid auto='yes'/></vsock></devices></domain>"),
        Conflict::Vsock
    );
    for argument in [
        "vhost-vsock-pci,guest-cid=3",
        "driver=vhost-user-vsock-pci,chardev=c",
        "{\"driver\":\"vhost-vsock-pci\",\"guest-cid\":3}",
    ] {
        let found = conflict(&with_arguments(&["--device", argument]));
        assert!(matches!(found, Conflict::VsockArgument { .. }), "{found}");
    }
    // Not where it means something else.
    edited(&with_arguments(&[
        "-name",
        "vsock",
        "-device",
        "virtio-rng-pci,id=vsock",
    ]));
}

#[test]
fn our_chardev_for_another_socket_is_refused() {
    let found = conflict(&with_arguments(&[
        "-chardev",
        "socket,id=vsocksidecar0,path=/elsewhere",
        "-device",
        "vhost-user-vsock-pci,chardev=vsocksidecar0",
    ]));
    assert_eq!(
        found.to_string(),
        "the domain has a chardev vsocksidecar0 already, for /elsewhere and not \
         /var/run/kubevirt-plugin/vsock-sidecar/vsock.sock: two plugins or hooks add a vsock-sidecar, remove one"
    );
}

#[test]
fn half_of_the_device_is_refused() {
    let [chardev, socket, device, vsock] = device().arguments();
    for half in [[&chardev, &socket], [&device, &vsock]] {
        let found = conflict(&with_arguments(&half.map(String::as_str)));
        assert!(matches!(found, Conflict::Half { .. }), "{found}");
    }
}

/// Found by the property below: what was appended became the value, and the second time half of the device was missing.
#[test]
fn an_option_without_its_value_is_refused() {
    let found = conflict(&with_arguments(&["-S", "--chardev"]));
    assert_eq!(
        found,
        Conflict::NoValue {
            option: "--chardev".to_owned()
        }
    );
}

#[test]
fn memory_that_cannot_be_shared_is_refused() {
    for private in [
        "<domain><devices><memory model='nvdimm' access='private'/></devices></domain>",
        "<domain><memoryBacking><source type='swap'/></memoryBacking></domain>",
        "<domain><memoryBacking><access mode='other'/></memoryBacking></domain>",
        &with_arguments(&["-object", "memory-backend-ram,id=m,size=1G"]),
        &with_arguments(&[
            "-object",
            "memory-backend-file,id=m,mem-path=/dev/hugepages,share=off",
        ]),
        &with_arguments(&[
            "-object",
            "{\"qom-type\":\"memory-backend-memfd\",\"id\":\"m\",\"share\":false}",
        ]),
    ] {
        let found = conflict(private);
        assert!(matches!(found, Conflict::Memory { .. }), "{found}");
    }
    edited(&with_arguments(&[
        "-object",
        "{\"qom-type\":\"memory-backend-file\",\"id\":\"m\",\"share\":true}",
        "-object",
        "memory-backend-memfd,id=n",
        "-object",
        "rng-random,id=r",
    ]));
    edited(
        "<domain><devices><memory model='nvdimm' access='shared'/><memory model='nvdimm'/></devices></domain>",
    );
}

#[test]
fn what_stands_twice_or_on_another_machine_is_refused() {
    let found = conflict("<domain>\n<memoryBacking/>\n<memoryBacking/></domain>");
    assert_eq!(
        found,
        Conflict::Twice {
            element: "memoryBacking",
            line: 3
        }
    );
    conflict("<domain><memoryBacking><access/><access/></memoryBacking></domain>");
    let found = conflict("<domain><os><type arch='s390x' machine='s390-ccw-virtio'>hvm</type></os></domain>");
    assert!(found.to_string().contains("s390x"), "{found}");
    edited("<domain><os><type arch='aarch64' machine='virt'>hvm</type></os></domain>");
}

#[test]
fn what_is_no_domain_of_qemu_is_refused() {
    for xml in [
        "<network/>",
        "<domain type='xen'/>",
        "<domain xmlns='urn:other'/>",
    ] {
        let error = edit(xml.as_bytes(), &device()).unwrap_err();
        assert!(matches!(error, DomainError::NotADomain { .. }), "{error}");
    }
}

#[test]
fn malformed_xml_is_refused_with_its_line() {
    for (xml, line) in [
        ("", 1),
        ("<domain>\n<name>", 2),
        ("<domain>\n</name></domain>", 2),
        ("<domain/>\n<domain/>", 2),
        ("<domain/>\ntext", 2),
        ("text<domain/>", 1),
        ("<domain/>&amp;", 1),
        ("<domain>\n\n&unknown;</domain>", 3),
        ("<domain>&#x110000;</domain>", 1),
        ("<domain a='1' a='2'/>", 1),
        ("<domain a=1/>", 1),
        ("<domain a='&x;'/>", 1),
        ("<domain>\n<x:y/></domain>", 2),
        ("<domain><!-- -- --></domain>", 1),
        ("<?xml version='1.1'?><domain/>", 1),
        ("<?xml version='1.0' encoding='ISO-8859-1'?><domain/>", 1),
        ("<domain><![CDATA[", 1),
    ] {
        assert_eq!(malformed(xml).0, line, "{xml}: {:?}", malformed(xml));
    }
    assert_eq!(
        edit(b"<domain>\xff</domain>", &device()),
        Err(DomainError::NotUtf8)
    );
}

#[test]
fn entities_of_its_own_are_refused_before_any_is_expanded() {
    let bomb = "<!DOCTYPE d [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]><domain>&b;</domain>";
    assert!(malformed(bomb).1.contains("document type declaration"));
    let file = "<!DOCTYPE d [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><domain>&a;</domain>";
    assert!(malformed(file).1.contains("document type declaration"));
}

/// Once the arguments of such an element were not seen: the device was added again with each call, and QEMU ends on the second of an id.
#[test]
fn a_namespace_with_a_reference_is_refused() {
    for namespace in [
        "http://libvirt.org/schemas/domain/qemu&#x2f;1.0",
        "http://libvirt.org/schemas/domain/qemu/1&#46;0",
    ] {
        let on_root =
            format!("<domain xmlns:qemu='{namespace}'><qemu:commandline/><qemu:commandline/></domain>");
        assert!(malformed(&on_root).1.contains("namespaces"));
        let inside = format!("<domain><commandline xmlns='{namespace}'/></domain>");
        assert!(malformed(&inside).1.contains("namespaces"));
    }
}

#[test]
fn depth_length_and_tags_have_a_bound() {
    let nest = |depth: usize| {
        let (open, close) = ("<a>".repeat(depth), "</a>".repeat(depth));
        format!("<domain>{open}{close}</domain>")
    };
    edited(&nest(MAX_DEPTH - 1));
    assert!(malformed(&nest(MAX_DEPTH)).1.contains("within one another"));
    assert!(malformed(&nest(500_000)).1.contains("within one another"));
    let attributes: String = (0..MAX_ATTRIBUTES + 1).map(|n| format!(" a{n}=''")).collect();
    assert!(
        malformed(&format!("<domain{attributes}/>"))
            .1
            .contains("attributes")
    );
    let attributes: String = (0..20_000).map(|n| format!(" a{n}=''")).collect();
    assert!(
        malformed(&format!("<domain{attributes}/>"))
            .1
            .contains("a tag of more than")
    );
    let long = format!("<domain>{}</domain>", " ".repeat(MAX_LENGTH));
    assert_eq!(
        edit(long.as_bytes(), &device()),
        Err(DomainError::TooLong { length: long.len() })
    );
    let bindings: String = (0..1000).map(|n| format!(" xmlns:p{n}='u'")).collect();
    malformed(&format!("<domain{bindings}/>"));
}

/// Many elements, attributes and options: what takes the square of their number would not end today.
#[test]
fn a_long_domain_takes_no_more_than_its_length() {
    edited(&format!("<domain>{}</domain>", "<a/>".repeat(200_000)));
    let attributes: String = (0..MAX_ATTRIBUTES - 1).map(|n| format!(" a{n}=''")).collect();
    let tags = format!("<a{attributes}/>\n").repeat(1_000_000 / attributes.len());
    edited(&format!(
        "<domain>{}</domain>",
        &tags[..tags.rfind('\n').unwrap()]
    ));
    let argument = format!("<qemu:arg value='{}'/>", ",".repeat(60_000));
    let arguments = argument.repeat(20);
    edited(&format!(
        "<domain xmlns:qemu='{QEMU_NAMESPACE}'><qemu:commandline>{arguments}</qemu:commandline></domain>"
    ));
}

/// Documents out of the words that matter here, most of them well-formed.
fn documents() -> impl Strategy<Value = String> {
    let words = prop::sample::select(vec![
        "domain",
        "memoryBacking",
        "source",
        "access",
        "cpu",
        "numa",
        "cell",
        "devices",
        "memory",
        "os",
        "type",
        "qemu:commandline",
        "qemu:arg",
        "x",
        "name",
    ]);
    let attributes = prop::collection::vec(
        prop::sample::select(vec![
            " type='memfd'",
            " type='anonymous'",
            " mode=\"private\"",
            " mode='shared'",
            " memAccess='private'",
            " access='private'",
            " value='-chardev'",
            " value='-device'",
            " value='a,b=&lt;'",
            " model='dimm'",
            " x = 'y'",
        ]),
        0..3,
    );
    let tag = (words, attributes).prop_map(|(word, attributes)| (word, attributes.concat()));
    let leaf = prop_oneof![
        tag.clone()
            .prop_map(|(word, attributes)| format!("<{word}{attributes}/>")),
        "[ \n\t]{0,4}",
        Just("<!-- c -->".to_owned()),
        Just("<![CDATA[<a>]]>".to_owned()),
        Just("&amp;".to_owned()),
    ];
    let tree = leaf.prop_recursive(5, 48, 6, move |inner| {
        (tag.clone(), prop::collection::vec(inner, 0..6)).prop_map(|((word, attributes), children)| {
            format!("<{word}{attributes}>{}</{word}>", children.concat())
        })
    });
    prop::collection::vec(tree, 0..6).prop_map(|children| {
        format!(
            "<domain xmlns:qemu='{QEMU_NAMESPACE}'>{}</domain>",
            children.concat()
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// Whatever the domain: an error, or a domain that needs no second edit and has all that the first one had.
    #[test]
    fn twice_is_once_and_nothing_is_lost(xml in documents()) {
        if let Ok(once) = edit(xml.as_bytes(), &device()) {
            let twice = edit(once.as_bytes(), &device()).unwrap();
            prop_assert!(matches!(twice, Cow::Borrowed(_)), "{once}\n{twice}");
            // The edits put in and change two words; taking these away gives what there was.
            prop_assert!(is_subsequence(&neutral(&xml), &neutral(&once)), "{xml}\n{once}");
        }
    }

    /// No bytes bring it down, and what it accepts stays accepted.
    #[test]
    fn any_text_is_an_error_or_a_domain(xml in ".{0,200}") {
        if let Ok(once) = edit(xml.as_bytes(), &device()) {
            prop_assert!(edit(once.as_bytes(), &device()).is_ok());
        }
    }

    /// A domain with some bytes of it changed.
    #[test]
    fn a_damaged_domain_is_an_error_or_a_domain(
        xml in documents(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)
    ) {
        let mut bytes = xml.into_bytes();
        for (index, byte) in damage {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(once) = edit(&bytes, &device()) {
            let twice = edit(once.as_bytes(), &device()).unwrap();
            prop_assert!(matches!(twice, Cow::Borrowed(_)), "{once}\n{twice}");
        }
    }
}

/// Without the values that an edit may change, and without the `/` of an empty element that it may fill.
fn neutral(xml: &str) -> String {
    ["private", "shared", "anonymous", "memfd"]
        .iter()
        .fold(xml.to_owned(), |xml, word| xml.replace(word, ""))
        .replace('/', "")
}

fn is_subsequence(part: &str, whole: &str) -> bool {
    let mut whole = whole.chars();
    part.chars().all(|wanted| whole.any(|c| c == wanted))
}
