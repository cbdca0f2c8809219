//! Bad files: one row a mistake, judged by the real binary.

use super::{Case, GUEST, stderr};

/// What is expected of one bad file: where, about what, and words of the message and the remedy.
struct Bad {
    story: &'static str,
    config: &'static str,
    /// `line:column`.
    at: &'static str,
    /// YAML path; empty for the file as a whole.
    path: &'static str,
    /// What the message says.
    says: &'static str,
    /// What the remedy says.
    remedy: &'static str,
    /// The marked part of the line.
    marked: &'static str,
}

/// One line a field, so that the table reads as a table.
macro_rules! bad {
    ($($story:literal: $config:literal => $at:literal $path:literal $says:literal $remedy:literal $marked:literal;)*) => {
        &[$(Bad {
            story: $story, config: $config, at: $at, path: $path, says: $says, remedy: $remedy, marked: $marked,
        },)*]
    };
}

const BAD: &[Bad] = bad![
    // Keys.
    "unknown key": "GUEST  outbond: []\n"
        => "5:3" "guests[0].outbond" "unknown key `outbond`" "did you mean `outbound`?" "outbond";
    "a key in snake case": "guests: [{name: web, cid: 3, vhost_user: {socket: DIR/web.sock}}]"
        => "1:30" "guests[0].vhost_user" "unknown key" "did you mean `vhostUser`?" "vhost_user";
    "a key like no other": "GUEST  turbo: true\n"
        => "5:3" "guests[0].turbo" "unknown key `turbo`" "keys here are `name`, `cid`, `vhostUser`" "turbo";
    "a key twice": "GUEST  cid: 4\n"
        => "5:3" "guests[0].cid" "`cid` is given a second time, after line 3" "keep one" "cid";
    "a key that is no text": "7: x\nguests: []"
        => "1:1" "?" "this key is no text" "`guests`" "7";
    "a missing key": "guests: [{name: web, vhostUser: {socket: DIR/web.sock}}]"
        => "1:10" "guests[0].cid" "the key `cid` is missing" "`cid: 3`" "{";
    "no guests key": "log: {level: info}\n"
        => "1:1" "guests" "the key `guests` is missing" "guests: [{name: web" "l";
    "no guest": "guests: []\n"
        => "1:9" "guests" "there is no guest" "at least one guest" "[";

    // Types.
    "text for a number": "guests: [{name: web, cid: three, vhostUser: {socket: DIR/web.sock}}]"
        => "1:27" "guests[0].cid" "`three` is of the wrong type (text)" "a number from 3" "three";
    "a quoted number": "GUEST  outbound: [{port: \"22\", to: tcp://a:1}]"
        => "5:21" "guests[0].outbound[0].port" "`22` is of the wrong type (text)" "without quotes" "\"22\"";
    "an octal number": "GUEST  outbound: [{port: 0514, to: tcp://a:1}]"
        => "5:21" "guests[0].outbound[0].port" "`0514` is of the wrong type" "leading zeros" "0514";
    "a number for text": "guests: [{name: 7, cid: 3, vhostUser: {socket: DIR/web.sock}}]"
        => "1:17" "guests[0].name" "7 is of the wrong type (a number)" "in quotes" "7";
    "a mapping for a list": "GUEST  outbound: {port: 22, to: tcp://a:1}"
        => "5:13" "guests[0].outbound" "a mapping is of the wrong type" "give a list" "{";
    "a list for a mapping": "admin: [tcp://0.0.0.0:9464]\nGUEST"
        => "1:8" "admin" "a list is of the wrong type" "a mapping with the keys `listen`" "[";
    "nothing": "GUEST  inbound:\n"
        => "5:3" "guests[0].inbound" "nothing is given" "`[]` is an empty one" "inbound";
    "an unknown word": "guests: [{name: web, cid: 3, vhostUser: {mode: sever, socket: DIR/web.sock}}]"
        => "1:48" "guests[0].vhostUser.mode" "`sever` is not known" "did you mean `server`?" "sever";

    "a PROXY protocol that nobody speaks any more": "GUEST  outbound: [{port: 1, to: tcp://a:1, proxyProtocol: v1}]"
        => "5:54" "guests[0].outbound[0].proxyProtocol" "`v1` is not known" "`v2`" "v1";

    // Names.
    "an upper-case name": "guests: [{name: Web, cid: 3, vhostUser: {socket: DIR/web.sock}}]"
        => "1:17" "guests[0].name" "`Web` is no name" "lower-case letters" "Web";
    "two guests with one name": "GUEST- name: web\n  cid: 4\n  vhostUser: {socket: DIR/b.sock}\n"
        => "5:9" "guests[1].name" "the name `web` belongs to the guest on line 2" "a name of its own" "web";
    "two rules with one name": "GUEST  outbound:\n  - {name: a, port: 1, to: tcp://a:1}\n  - {name: a, port: 2, to: tcp://a:1}\n"
        => "7:12" "guests[0].outbound[1].name" "the name `a` belongs to the rule on line 6" "a name of its own" "a";

    // CIDs.
    "CID 0": "guests: [{name: web, cid: 0, vhostUser: {socket: DIR/web.sock}}]"
        => "1:27" "guests[0].cid" "VMADDR_CID_HYPERVISOR" "from 3 to 4294967294" "0";
    "CID 1": "guests: [{name: web, cid: 1, vhostUser: {socket: DIR/web.sock}}]"
        => "1:27" "guests[0].cid" "VMADDR_CID_LOCAL" "from 3 to 4294967294" "1";
    "CID 2": "guests: [{name: web, cid: 2, vhostUser: {socket: DIR/web.sock}}]"
        => "1:27" "guests[0].cid" "VMADDR_CID_HOST" "from 3 to 4294967294" "2";
    "CID any": "guests: [{name: web, cid: 4294967295, vhostUser: {socket: DIR/web.sock}}]"
        => "1:27" "guests[0].cid" "VMADDR_CID_ANY" "from 3 to 4294967294" "4294967295";
    "a CID below zero": "guests: [{name: web, cid: -3, vhostUser: {socket: DIR/web.sock}}]"
        => "1:27" "guests[0].cid" "-3 is out of range" "from 3 to 4294967294" "-3";
    "a CID twice": "GUEST- name: b\n  cid: 3\n  vhostUser: {socket: DIR/b.sock}\n"
        => "6:8" "guests[1].cid" "the CID 3 belongs to the guest on line 3" "a CID of its own" "3";

    "connections to loopback": "GUEST  outbound: [{port: 1, cid: 1, to: tcp://a:1}]"
        => "5:29" "guests[0].outbound[0].cid" "VMADDR_CID_LOCAL" "2 for the host" "1";
    "connections to any CID": "GUEST  outbound: [{port: 1, cid: 4294967295, to: tcp://a:1}]"
        => "5:29" "guests[0].outbound[0].cid" "VMADDR_CID_ANY" "2 for the host" "4294967295";
    "connections to the guest's own CID": "GUEST  outbound: [{port: 1, cid: 3, to: tcp://a:1}]"
        => "5:29" "guests[0].outbound[0].cid" "3 is the guest's own CID" "the CID of another guest" "3";

    // Ports.
    "vsock port 0": "GUEST  outbound: [{port: 0, to: tcp://a:1}]"
        => "5:21" "guests[0].outbound[0].port" "0 is no vsock port" "vsock port from 1 to 4294967294" "0";
    "vsock port any": "GUEST  inbound: [{port: 4294967295, listen: tcp://127.0.0.1:1}]"
        => "5:20" "guests[0].inbound[0].port" "VMADDR_PORT_ANY" "vsock port from 1 to 4294967294" "4294967295";
    "TCP port 0": "GUEST  outbound: [{port: 1, to: tcp://a:0}]"
        => "5:28" "guests[0].outbound[0].to" "0 is no TCP port" "TCP port from 1 to 65535" "tcp://a:0";
    "TCP port 70000": "GUEST  outbound: [{port: 70000, to: tcp://a:70000}]"
        => "5:32" "guests[0].outbound[0].to" "70000 is no TCP port" "TCP port from 1 to 65535" "tcp://a:70000";
    "listening on TCP port 70000": "admin: {listen: [tcp://0.0.0.0:70000]}\nGUEST"
        => "1:18" "admin.listen[0]" "70000 is no TCP port" "from 1 to 65535" "tcp://0.0.0.0:70000";
    "listening on TCP port 0": "admin: {listen: [tcp://0.0.0.0:0]}\nGUEST"
        => "1:18" "admin.listen[0]" "0 is no TCP port" "from 1 to 65535" "tcp://0.0.0.0:0";
    "a range for one port": "GUEST  outbound: [{ports: 8000, to: tcp://a:1}]"
        => "5:22" "guests[0].outbound[0].ports" "8000 is one port, not a range" "`port: 8000`" "8000";
    "a range backwards": "GUEST  outbound: [{ports: 9-8, to: tcp://a:1}]"
        => "5:22" "guests[0].outbound[0].ports" "ends before it begins" "write 8-9" "9-8";
    "a range from 0": "GUEST  outbound: [{ports: 0-8, to: tcp://a:1}]"
        => "5:22" "guests[0].outbound[0].ports" "0 is no vsock port" "from 1 to" "0-8";
    "a range of words": "GUEST  outbound: [{ports: all, to: tcp://a:1}]"
        => "5:22" "guests[0].outbound[0].ports" "`all` is no range of ports" "such as 8000-8099" "all";
    "a range past the last TCP port": "GUEST  outbound: [{ports: 8000-8099, to: tcp://a:65500}]"
        => "5:37" "guests[0].outbound[0].to" "ports 8000-8099 would reach up to TCP port 65599" "end the range at 8035" "tcp://a:65500";
    "port and ports": "GUEST  outbound: [{ports: 8000-8099, port: 1, to: tcp://a:1}]"
        => "5:14" "guests[0].outbound[0]" "`port` and `ports` exclude each other" "keep `port` for one port" "{";
    "neither port nor ports": "GUEST  outbound: [{to: tcp://a:1}]"
        => "5:14" "guests[0].outbound[0].port" "the key `port` is missing" "`ports: 8000-8099`" "{";
    "port and protocol": "GUEST  inbound: [{listen: tcp://127.0.0.1:1, port: 22, protocol: connect}]"
        => "5:13" "guests[0].inbound[0]" "exclude each other" "the client names the port" "{";
    "neither port nor protocol": "GUEST  inbound: [{listen: tcp://127.0.0.1:1}]"
        => "5:13" "guests[0].inbound[0].port" "the key `port` is missing" "`protocol: connect`" "{";

    // Rules that are never used.
    "a port twice": "GUEST  outbound:\n  - {name: one, port: 22, to: tcp://a:1}\n  - {name: two, port: 22, to: tcp://b:1}\n"
        => "7:5" "guests[0].outbound[1]" "never used: port 22 belongs to the rule `one` (port 22) on line 6" "move this rule up" "{";
    "a range in a range": "GUEST  outbound:\n  - {ports: 1-100, to: tcp://a:1}\n  - {ports: 20-30, to: tcp://b:1}\n"
        => "7:5" "guests[0].outbound[1]" "ports 20-30 belongs to the rule for ports 1-100 on line 6" "move this rule up" "{";
    "hidden by two together": "GUEST  outbound:\n  - {ports: 50-99, to: tcp://a:1}\n  - {ports: 1-49, to: tcp://a:1}\n  - {ports: 20-60, to: tcp://b:1}\n"
        => "8:5" "guests[0].outbound[2]" "the rule for ports 1-49 on line 7, the rule for ports 50-99 on line 6" "move this rule up" "{";

    "a port of a guest twice": "GUEST  outbound:\n  - {ports: 1-9, to: guest://db}\n  - {cid: 4, port: 2, to: guest://db}\n- {name: db, cid: 4, vhostUser: {socket: DIR/b.sock}}"
        => "7:5" "guests[0].outbound[1]" "never used: port 2 of CID 4 belongs to the rule for ports 1-9 of CID 4 on line 6" "move this rule up" "{";

    // Listeners.
    "one address twice": "admin: {listen: [tcp://127.0.0.1:9464]}\nGUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:9464}]"
        => "6:31" "guests[0].inbound[0].listen" "listened on already, on line 1" "an address of its own" "tcp://127.0.0.1:9464";
    "a wildcard before": "admin: {listen: [tcp://0.0.0.0:9464]}\nGUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:9464}]"
        => "6:31" "guests[0].inbound[0].listen" "and tcp://0.0.0.0:9464 on line 1 take the same port" "of its own" "tcp://127.0.0.1:9464";
    "a wildcard after": "GUEST  inbound:\n  - {port: 1, listen: tcp://127.0.0.1:1}\n  - {port: 2, listen: tcp://0.0.0.0:1}\n"
        => "7:23" "guests[0].inbound[1].listen" "and tcp://127.0.0.1:1 on line 6 take the same port" "of its own" "tcp://0.0.0.0:1";
    "the admin server's wildcard of both families": "admin: {listen: ['tcp://[::]:1']}\nGUEST  inbound: [{port: 2, listen: tcp://127.0.0.1:1}]"
        => "6:31" "guests[0].inbound[0].listen" "and tcp://[::]:1 on line 1 take the same port" "of its own" "tcp://127.0.0.1:1";
    "a wildcard before, in IPv6": "GUEST  inbound:\n  - {port: 1, listen: 'tcp://[::]:1'}\n  - {port: 2, listen: 'tcp://[::1]:1'}\n"
        => "7:23" "guests[0].inbound[1].listen" "and tcp://[::]:1 on line 6 take the same port" "of its own" "'tcp://[::1]:1'";
    "an IPv4 address as IPv6": "GUEST  inbound: [{port: 1, listen: 'tcp://[::ffff:127.0.0.1]:1'}]"
        => "5:31" "guests[0].inbound[0].listen" "`::ffff:127.0.0.1` is an IPv4 address" "write tcp://127.0.0.1:1" "'tcp://[::ffff:127.0.0.1]:1'";
    "one AF_VSOCK port twice": "GUEST  inbound:\n  - {port: 1, listen: vsock://22}\n  - {port: 2, listen: vsock://22}\n"
        => "7:23" "guests[0].inbound[1].listen" "vsock://22 is listened on already, on line 6" "a port of its own" "vsock://22";
    "an AF_VSOCK listener with a CID": "GUEST  inbound: [{port: 1, listen: vsock://2:22}]"
        => "5:31" "guests[0].inbound[0].listen" "on every CID of this host" "write vsock://22" "vsock://2:22";
    "an AF_VSOCK listener without a port": "GUEST  inbound: [{port: 1, listen: 'vsock://'}]"
        => "5:31" "guests[0].inbound[0].listen" "`` is no vsock port" "from 1 to 4294967294" "'vsock://'";
    "listening on a guest": "GUEST  inbound: [{port: 1, listen: guest://db}]"
        => "5:31" "guests[0].inbound[0].listen" "a guest is no address of ours" "`to: guest://db`" "guest://db";
    "the admin server on AF_VSOCK": "admin: {listen: [vsock://9464]}\nGUEST"
        => "1:18" "admin.listen[0]" "TCP and unix sockets only" "such as tcp://127.0.0.1:9464" "vsock://9464";
    "one address in two guests": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1}]\n- name: b\n  cid: 4\n  vhostUser: {socket: DIR/b.sock}\n  inbound: [{port: 1, listen: tcp://127.0.0.1:1}]"
        => "9:31" "guests[1].inbound[0].listen" "listened on already, on line 5" "of its own" "tcp://127.0.0.1:1";
    "listening on a name": "GUEST  inbound: [{port: 1, listen: tcp://web.example:1}]"
        => "5:31" "guests[0].inbound[0].listen" "is a name; a listener needs an IP address" "tcp://0.0.0.0:1" "tcp://web.example:1";
    "listening on localhost": "GUEST  inbound: [{port: 1, listen: tcp://localhost:1}]"
        => "5:31" "guests[0].inbound[0].listen" "`localhost` can mean two addresses" "write tcp://127.0.0.1:1 or tcp://[::1]:1" "tcp://localhost:1";

    // Who may connect.
    "a range with host bits": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, allow: [10.0.0.0/8, 10.1.2.3/8]}]"
        => "5:70" "guests[0].inbound[0].allow[1]" "`10.1.2.3/8` has bits set behind its prefix" "write 10.0.0.0/8 for the range, or 10.1.2.3 for the one address" "10.1.2.3/8";
    "a prefix that is too long": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, allow: [10.0.0.0/33]}]"
        => "5:58" "guests[0].inbound[0].allow[0]" "an IPv4 address has no prefix of 33 bits" "from 0 to 32" "10.0.0.0/33";
    "a name in a list of ranges": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, allow: [localhost]}]"
        => "5:58" "guests[0].inbound[0].allow[0]" "`localhost` is no range of IP addresses" "10.0.0.0/8" "localhost";
    "one range that is no list": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, allow: 10.0.0.0/8}]"
        => "5:57" "guests[0].inbound[0].allow" "`10.0.0.0/8` is of the wrong type (text)" "give a list" "10.0.0.0/8";
    "nobody allowed": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, allow: []}]"
        => "5:57" "guests[0].inbound[0].allow" "the listener has no use" "remove the key to let everyone in" "[";
    "ranges for a unix listener": "GUEST  inbound: [{port: 1, allow: [10.0.0.0/8], listen: 'unix://DIR/a.sock'}]"
        => "5:30" "guests[0].inbound[0].allow" "clients of a unix socket have no IP addresses" "permissions of the socket" "[";
    "ranges of the other family": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, allow: ['fd00::/8']}]"
        => "5:57" "guests[0].inbound[0].allow" "only IPv6 addresses are allowed, and tcp://127.0.0.1:1 takes IPv4 clients" "add ranges of IPv4 addresses" "[";
    "ranges of IPv4 on the wildcard of IPv6": "GUEST  inbound: [{port: 1, listen: 'tcp://[::]:1', allow: [10.0.0.0/8]}]"
        => "5:54" "guests[0].inbound[0].allow" "only IPv4 addresses are allowed, and tcp://[::]:1 takes IPv6 clients" "ranges of IPv6" "[";
    "ranges for an AF_VSOCK listener": "GUEST  inbound: [{port: 1, listen: vsock://22, allow: [10.0.0.0/8]}]"
        => "5:50" "guests[0].inbound[0].allow" "clients of AF_VSOCK have no IP addresses" "listen on TCP" "[";
    "a wait of some length": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, waitForGuest: 5s}]"
        => "5:64" "guests[0].inbound[0].waitForGuest" "`5s` is of the wrong type (text)" "`true` or `false`" "5s";

    // Messages.
    "messages on TCP": "GUEST  inbound: [{port: 1, listen: tcp://127.0.0.1:1, socketType: seqpacket}]"
        => "5:62" "guests[0].inbound[0].socketType" "TCP is a stream of bytes" "`framing: length-prefixed`" "seqpacket";
    "messages on AF_VSOCK": "GUEST  inbound: [{port: 1, listen: vsock://1, socketType: seqpacket}]"
        => "5:54" "guests[0].inbound[0].socketType" "for streams only" "listen on a unix socket" "seqpacket";
    "a socket type of datagrams": "GUEST  inbound: [{port: 1, socketType: dgram, listen: 'unix://DIR/a.sock'}]"
        => "5:35" "guests[0].inbound[0].socketType" "`dgram` is not known" "`stream` or `seqpacket`" "dgram";
    "a CONNECT line as a message": "GUEST  inbound: [{protocol: connect, socketType: seqpacket, listen: 'unix://DIR/a.sock'}]"
        => "5:45" "guests[0].inbound[0].socketType" "is a line of text" "give the rule a `port`" "seqpacket";
    "a CONNECT line in frames": "GUEST  inbound: [{protocol: connect, framing: length-prefixed, listen: 'unix://DIR/a.sock'}]"
        => "5:42" "guests[0].inbound[0].framing" "begins with a line of text" "give the rule a `port`" "length-prefixed";
    "frames for messages that have boundaries": "GUEST  inbound: [{port: 1, socketType: seqpacket, framing: length-prefixed, listen: 'unix://DIR/a.sock'}]"
        => "5:55" "guests[0].inbound[0].framing" "without frames" "keep one of" "length-prefixed";
    "frames on an AF_VSOCK listener": "GUEST  inbound: [{port: 1, listen: vsock://1, framing: length-prefixed}]"
        => "5:51" "guests[0].inbound[0].framing" "for plain streams only" "listen on TCP" "length-prefixed";
    "frames to a unix socket": "GUEST  outbound: [{port: 1, to: unix:///a, framing: length-prefixed}]"
        => "5:48" "guests[0].outbound[0].framing" "the guest's own type of socket" "tcp:// targets" "length-prefixed";
    "frames to AF_VSOCK": "GUEST  outbound: [{port: 1, to: vsock://2:1, framing: length-prefixed}]"
        => "5:50" "guests[0].outbound[0].framing" "for plain streams only" "tcp:// targets" "length-prefixed";
    "frames of some kind": "GUEST  outbound: [{port: 1, to: tcp://a:1, framing: lengthPrefixed}]"
        => "5:48" "guests[0].outbound[0].framing" "`lengthPrefixed` is not known" "did you mean `length-prefixed`?" "lengthPrefixed";
    "a longest message without frames": "GUEST  outbound: [{port: 1, to: tcp://a:1, maxMessage: 64KiB}]"
        => "5:51" "guests[0].outbound[0].maxMessage" "this rule has none" "add `framing: length-prefixed`" "64KiB";
    "a longest message of nothing": "GUEST  outbound: [{port: 1, to: tcp://a:1, framing: length-prefixed, maxMessage: 0}]"
        => "5:77" "guests[0].outbound[0].maxMessage" "0 bytes is no bound" "from 1 to 256KiB" "0";
    "a message that fits into no buffer": "GUEST  outbound: [{port: 1, to: tcp://a:1, framing: length-prefixed, maxMessage: 257KiB}]"
        => "5:77" "guests[0].outbound[0].maxMessage" "257KiB does not fit into the buffer" "`limits.buffer`, or raise that" "257KiB";
    "a message larger than a small buffer": "GUEST  limits: {buffer: 4KiB}\n  inbound: [{port: 1, listen: tcp://127.0.0.1:1, framing: length-prefixed, maxMessage: 8KiB}]"
        => "6:88" "guests[0].inbound[0].maxMessage" "8KiB does not fit" "from 1 to 4KiB" "8KiB";
    "no connections of a rule": "GUEST  outbound: [{port: 1, to: tcp://a:1, connections: 0}]"
        => "5:52" "guests[0].outbound[0].connections" "0 is no usable limit" "from 1 to 1000000" "0";

    // Sockets.
    "two guests with one socket": "GUEST- name: b\n  cid: 4\n  vhostUser: {socket: DIR/./web.sock}\n"
        => "7:23" "guests[1].vhostUser.socket" "is in use on line 4" "a path of its own" "DIR/./web.sock";
    "a guest's socket as a listener": "GUEST  inbound: [{port: 1, listen: 'unix://DIR/web.sock'}]"
        => "5:31" "guests[0].inbound[0].listen" "is in use on line 4" "a path of its own" "'unix://DIR/web.sock'";
    "a relative path": "guests: [{name: web, cid: 3, vhostUser: {socket: run/web.sock}}]"
        => "1:50" "guests[0].vhostUser.socket" "`run/web.sock` is a relative path" "/run/run/web.sock" "run/web.sock";
    "a relative unix listener": "admin: {listen: ['unix://run/a.sock']}\nGUEST"
        => "1:18" "admin.listen[0]" "`run/a.sock` is a relative path" "absolute path" "'unix://run/a.sock'";
    "a URL for a path": "guests: [{name: web, cid: 3, vhostUser: {socket: 'unix:///run/web.sock'}}]"
        => "1:50" "guests[0].vhostUser.socket" "without `unix://`" "write /run/web.sock" "'unix:///run/web.sock'";
    "a path that is too long": "guests: [{name: web, cid: 3, vhostUser: {socket: /tmp/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012}}]"
        => "1:50" "guests[0].vhostUser.socket" "has 108 bytes; a socket address (sun_path) holds 107" "a shorter path" "/tmp/0123";
    "a path that becomes too long": "GUEST  outbound: [{ports: 1-10000, to: 'unix:///tmp/012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678_{port}'}]"
        => "5:35" "guests[0].outbound[0].to" "has 110 bytes" "a shorter path" "'unix:///tmp";
    "a missing directory": "guests: [{name: web, cid: 3, vhostUser: {socket: DIR/gone/web.sock}}]"
        => "1:50" "guests[0].vhostUser.socket" "gone` does not exist" "create it" "DIR/gone/web.sock";
    "a missing directory of a listener": "admin: {listen: ['unix://DIR/gone/a.sock']}\nGUEST"
        => "1:18" "admin.listen[0]" "gone` does not exist" "create it" "'unix://DIR/gone/a.sock'";
    "a file as a directory": "guests: [{name: web, cid: 3, vhostUser: {socket: DIR/config.yaml/web.sock}}]"
        => "1:50" "guests[0].vhostUser.socket" "config.yaml` " "create it" "DIR/config.yaml/web.sock";
    "a directory as a socket": "guests: [{name: web, cid: 3, vhostUser: {socket: DIR/}}]"
        => "1:50" "guests[0].vhostUser.socket" "the path of a directory" "add the name" "DIR/";
    "a placeholder that nobody fills in": "admin: {listen: ['unix:///run/{cid}.sock']}\nGUEST"
        => "1:18" "admin.listen[0]" "nothing is filled in here" "write the path out" "'unix:///run/{cid}.sock'";

    // Targets.
    "an unknown placeholder": "GUEST  outbound: [{port: 1, to: 'unix:///run/{prt}.sock'}]"
        => "5:28" "guests[0].outbound[0].to" "unknown placeholder `{prt}`" "{port} and {cid}" "'unix:///run/{prt}.sock'";
    "an open brace": "GUEST  outbound: [{port: 1, to: 'unix:///run/{port'}]"
        => "5:28" "guests[0].outbound[0].to" "unknown placeholder `{port`" "{port} and {cid}" "'unix:///run/{port'";
    "an unknown scheme": "GUEST  outbound: [{port: 1, to: 'http://db'}]"
        => "5:28" "guests[0].outbound[0].to" "unknown scheme `http`" "tcp://postgres" "'http://db'";
    "a guest that is not there": "GUEST  outbound: [{port: 1, to: guest://db}]"
        => "5:28" "guests[0].outbound[0].to" "there is no guest `db` in this file" "no other guest" "guest://db";
    "a guest that was misspelled": "GUEST  outbound: [{port: 1, to: guest://batabase}]\n- name: database\n  cid: 4\n  vhostUser: {socket: DIR/b.sock}\n"
        => "5:28" "guests[0].outbound[0].to" "there is no guest `batabase` in this file" "did you mean `guest://database`?" "guest://batabase";
    "a guest like no other": "GUEST  outbound: [{port: 1, to: guest://x}]\n- name: db\n  cid: 4\n  vhostUser: {socket: DIR/b.sock}\n- name: mail\n  cid: 5\n  vhostUser: {socket: DIR/c.sock}\n"
        => "5:28" "guests[0].outbound[0].to" "there is no guest `x`" "the other guests of this file are `db`, `mail`" "guest://x";
    "a guest to itself": "GUEST  outbound: [{port: 1, to: guest://web}]"
        => "5:28" "guests[0].outbound[0].to" "`web` is the guest to which this rule belongs" "VMADDR_CID_LOCAL" "guest://web";
    "a guest without a name": "GUEST  outbound: [{port: 1, to: 'guest://'}]"
        => "5:28" "guests[0].outbound[0].to" "the name of the guest is missing" "such as guest://db" "'guest://'";
    "a guest's port 0": "GUEST  outbound: [{port: 1, to: 'guest://db:0'}]\n- {name: db, cid: 4, vhostUser: {socket: DIR/b.sock}}"
        => "5:28" "guests[0].outbound[0].to" "0 is no vsock port" "from 1 to 4294967294" "'guest://db:0'";
    "a PROXY header for a guest": "GUEST  outbound: [{port: 1, to: guest://db, proxyProtocol: v2}]\n- {name: db, cid: 4, vhostUser: {socket: DIR/b.sock}}"
        => "5:55" "guests[0].outbound[0].proxyProtocol" "it sees the CID and the port" "remove `proxyProtocol`" "v2";
    "frames to a guest": "GUEST  outbound: [{port: 1, to: guest://db, framing: length-prefixed}]\n- {name: db, cid: 4, vhostUser: {socket: DIR/b.sock}}"
        => "5:49" "guests[0].outbound[0].framing" "with their boundaries, without frames" "tcp:// targets" "length-prefixed";
    "AF_VSOCK without a port": "GUEST  outbound: [{port: 1, to: 'vsock://2'}]"
        => "5:28" "guests[0].outbound[0].to" "lacks a port" "such as vsock://2:22" "'vsock://2'";
    "AF_VSOCK by name": "GUEST  outbound: [{port: 1, to: 'vsock://host:22'}]"
        => "5:28" "guests[0].outbound[0].to" "`host` is no CID" "2 is the host" "'vsock://host:22'";
    "AF_VSOCK to any CID": "GUEST  outbound: [{port: 1, to: 'vsock://4294967295:22'}]"
        => "5:28" "guests[0].outbound[0].to" "VMADDR_CID_ANY" "from 0 to 4294967294" "'vsock://4294967295:22'";
    "a range past the last port of AF_VSOCK": "GUEST  outbound: [{ports: 1-10, to: 'vsock://2:4294967290'}]"
        => "5:32" "guests[0].outbound[0].to" "would reach up to vsock port 4294967299" "end the range at 5" "'vsock://2:4294967290'";
    "a range past the last port of a guest": "GUEST  outbound: [{ports: 1-10, to: 'guest://db:4294967286'}]\n- {name: db, cid: 4, vhostUser: {socket: DIR/b.sock}}"
        => "5:32" "guests[0].outbound[0].to" "would reach up to vsock port 4294967295" "end the range at 9" "'guest://db:4294967286'";
    "no scheme": "GUEST  outbound: [{port: 1, to: 'db:5432'}]"
        => "5:28" "guests[0].outbound[0].to" "`db:5432` has no scheme" "did you mean `tcp://db:5432`?" "'db:5432'";
    "a bare path": "GUEST  outbound: [{port: 1, to: /run/log.sock}]"
        => "5:28" "guests[0].outbound[0].to" "has no scheme" "did you mean `unix:///run/log.sock`?" "/run/log.sock";
    "no port": "GUEST  outbound: [{port: 1, to: 'tcp://db'}]"
        => "5:28" "guests[0].outbound[0].to" "lacks a port" "tcp://postgres" "'tcp://db'";
    "a path after the port": "GUEST  outbound: [{port: 1, to: 'tcp://db:1/x'}]"
        => "5:28" "guests[0].outbound[0].to" "a path after the port" "ends with its port" "'tcp://db:1/x'";
    "IPv6 without brackets": "GUEST  outbound: [{port: 1, to: 'tcp://::1:80'}]"
        => "5:28" "guests[0].outbound[0].to" "more than one `:`" "in brackets" "'tcp://::1:80'";
    "an IPv4 address that is none": "GUEST  outbound: [{port: 1, to: 'tcp://10.0.0.256:80'}]"
        => "5:28" "guests[0].outbound[0].to" "`10.0.0.256` is no IPv4 address" "from 0 to 255" "'tcp://10.0.0.256:80'";
    "a host with a space": "GUEST  outbound: [{port: 1, to: 'tcp://my db:80'}]"
        => "5:28" "guests[0].outbound[0].to" "`my db` is no host" "a host name" "'tcp://my db:80'";

    // Confinement.
    "a filter that the kernel does not take": "confinement: {noNewPrivileges: false, landlock: off}\nGUEST"
        => "1:32" "confinement.noNewPrivileges" "seccomp cannot be had" "add `seccomp: off` and `landlock: off`" "false";
    "a mode that does not exist": "confinement: {seccomp: kill}\nGUEST"
        => "1:24" "confinement.seccomp" "`kill`" "enforce" "kill";

    // Durations, sizes, levels.
    "no unit": "drain: {timeout: 25}\nGUEST"
        => "1:18" "drain.timeout" "`25` lacks a unit" "write 25s for seconds" "25";
    "an unknown unit": "drain: {timeout: 25sec}\nGUEST"
        => "1:18" "drain.timeout" "`25sec` is no duration" "unit us, ms, s, m or h" "25sec";
    "a drain that never ends": "drain: {timeout: 2h}\nGUEST"
        => "1:18" "drain.timeout" "2h is out of range" "from 0s to 1h" "2h";
    "a duration that overflows": "drain: {timeout: 9999999999999999999h}\nGUEST"
        => "1:18" "drain.timeout" "is no duration" "such as 500ms" "9999999999999999999h";
    "a dial longer than the guest waits": "GUEST  limits: {connectTimeout: 2s}"
        => "5:28" "guests[0].limits.connectTimeout" "2s is too long: a guest's connect() gives up after 2s" "less than 2s" "2s";
    "no time at all": "GUEST  limits: {connectTimeout: 0s}"
        => "5:28" "guests[0].limits.connectTimeout" "0s is out of range" "from 1ms" "0s";
    "a guest timeout of zero": "GUEST  limits: {guestTimeout: 0ms}"
        => "5:26" "guests[0].limits.guestTimeout" "0s is out of range" "from 1ms to 1h" "0ms";
    "a decimal unit": "GUEST  limits: {buffer: 256KB}"
        => "5:20" "guests[0].limits.buffer" "`256KB` is no size" "did you mean 256KiB?" "256KB";
    "a buffer that is too small": "GUEST  limits: {buffer: 4095}"
        => "5:20" "guests[0].limits.buffer" "4095 is no usable size" "from 4KiB to 16MiB" "4095";
    "a buffer that is too large": "GUEST  limits: {buffer: 17MiB}"
        => "5:20" "guests[0].limits.buffer" "17MiB is no usable size" "from 4KiB to 16MiB" "17MiB";
    "memory for less than one connection": "GUEST  limits: {buffer: 1MiB, memory: 256KiB}"
        => "5:34" "guests[0].limits.memory" "256KiB cannot hold the buffer of one connection (1MiB)" "from that of `buffer`" "256KiB";
    "more memory than there is": "GUEST  limits: {memory: 2000GiB}"
        => "5:20" "guests[0].limits.memory" "2000GiB is no usable size" "to 1024GiB" "2000GiB";
    "too little memory for all guests": "limits: {memory: 64KiB}\nGUEST"
        => "1:18" "limits.memory" "64KiB is no usable size of the memory of all guests" "from 1MiB" "64KiB";
    "a rate that nobody has": "GUEST  limits: {connectionsPerSecond: 1000001}"
        => "5:34" "guests[0].limits.connectionsPerSecond" "1000001 is no usable rate" "0 for no bound" "1000001";
    "a guest's limit of the file": "limits: {idleTimeout: 1h}\nGUEST"
        => "1:10" "limits.idleTimeout" "unknown key `idleTimeout`" "keys here are `connections`, `memory`" "idleTimeout";
    "no connections": "GUEST  limits: {connections: 0}"
        => "5:25" "guests[0].limits.connections" "0 is no usable limit" "from 1 to 1000000" "0";
    "a mistyped level": "log: {level: inof}\nGUEST"
        => "1:14" "log.level" "`inof` is no log level" "did you mean `info`?" "inof";
    "an unknown format": "log: {format: yaml}\nGUEST"
        => "1:15" "log.format" "`yaml` is not known" "`text` or `json`" "yaml";

    // YAML itself.
    "a tab": "guests:\n\t- name: web\n"
        => "2:2" "" "tabs" "with spaces" "-";
    "an open bracket": "guests: [\n"
        => "1:9" "" "not valid YAML: unclosed bracket" "close each" "[";
    "bad indentation": "guests:\n  - name: a\n   cid: 3\n"
        => "3:4" "" "not valid YAML" "stand in one column" "c";
    "two documents": "guests: []\n---\nguests: []\n"
        => "3:1" "" "a second YAML document" "remove `---`" "guests";
    "an unknown anchor": "guests: *web\n"
        => "1:9" "" "no anchor of this name" "`&name`" "*web";
    "an alias of itself": "guests: &a [*a]\n"
        => "1:13" "" "inside its own anchor" "write the value out" "*a";
    "a tag": "guests: !secret x\n"
        => "1:17" "" "unsupported tag `!secret`" "remove the `!tag`" "x";
    "text alone": "hello\n"
        => "1:1" "" "`hello` is of the wrong type" "a mapping with the keys `admin`" "hello";
];

/// Every bad file: exit code 64, nothing on stdout, and a message with place, path, line, mark and remedy.
#[test]
fn each_bad_file_is_explained() {
    let mut failures = String::new();
    for bad in BAD {
        let case = Case::with_dir(&bad.config.replace("GUEST", GUEST));
        let output = case.check();
        let dir = case.path().display().to_string();
        let text = stderr(&output);
        let prefix = if bad.path.is_empty() {
            format!("error: config.yaml:{}: ", bad.at)
        } else {
            format!("error: config.yaml:{}: {}: ", bad.at, bad.path)
        };
        let explained = text.split("error: ").filter(|part| !part.is_empty()).any(|part| {
            let part = format!("error: {part}");
            let mut lines = part.lines();
            let (message, line, mark) = (
                lines.next().unwrap_or(""),
                lines.next().unwrap_or(""),
                lines.next().unwrap_or(""),
            );
            message.starts_with(&prefix)
                && message.contains(bad.says)
                && lines.any(|line| line.trim_start().starts_with("= ") && line.contains(bad.remedy))
                && marks(line, mark, &bad.marked.replace("DIR", &dir))
        });
        if output.status.code() != Some(64) || !output.stdout.is_empty() || !explained {
            failures += &format!(
                "--- {}: expected `{prefix}…{}…{}`, got {}\n{text}\n",
                bad.story, bad.says, bad.remedy, output.status
            );
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

/// Whether the carets of `mark` begin under `part` of `line`, and mark all of it if there is more than one.
fn marks(line: &str, mark: &str, part: &str) -> bool {
    let Some(start) = mark.chars().position(|c| c == '^') else {
        return false;
    };
    let marked = mark.chars().filter(|&c| c == '^').count();
    let under: String = line.chars().skip(start).take(part.chars().count()).collect();
    let under_whole = under.trim_end() == part.trim_end();
    under_whole && (marked == 1 || marked >= part.chars().count())
}

/// Most of the table's rows have one mistake and must get one message, not a cascade.
#[test]
fn one_mistake_gives_one_message() {
    for bad in BAD {
        // No guest is left in these, or the file is no mapping of the schema at all.
        if ["a key that is no text", "two rules with one name"].contains(&bad.story) {
            continue;
        }
        let text = stderr(&Case::with_dir(&bad.config.replace("GUEST", GUEST)).check());
        assert_eq!(text.matches("error: ").count(), 1, "{}:\n{text}", bad.story);
    }
}
