//! Why a connection was refused or ended: closed lists, which become metric labels and log fields.

macro_rules! labelled {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident => $label:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $name { $($(#[$vmeta])* $variant,)* }

        impl $name {
            /// Every variant's label, in declaration order: `LABELS[x as usize] == x.label()`.
            pub const LABELS: &'static [&'static str] = &[$($label,)*];

            /// The metric label and log word of this value.
            pub fn label(self) -> &'static str {
                Self::LABELS[self as usize]
            }
        }
    };
}
pub(crate) use labelled;

labelled! {
    /// Why a connection that was asked for did not come to be.
    RefuseReason {
        /// No rule of the configuration matches the port.
        NoRule => "no_rule",
        /// The client of an inbound rule has an address that the rule's `allow` does not name.
        Acl => "acl",
        /// The guest has `limits.connections`, or the kernel has no room (memory, local ports).
        Limit => "limit",
        /// The rule has `connections`.
        RuleLimit => "rule_limit",
        /// The guest has had `limits.connectionsPerSecond`.
        RateLimit => "rate_limit",
        /// All guests together have the `limits.connections` of the file.
        SidecarLimit => "sidecar_limit",
        /// The file descriptors that connections may have are used up.
        Descriptors => "descriptors",
        /// The target refused (ECONNREFUSED, or a unix socket that nobody serves).
        DialRefused => "dial_refused",
        /// The target did not answer within `connectTimeout`.
        DialTimeout => "dial_timeout",
        /// The target's name was not found or could not be resolved.
        Dns => "dns",
        /// No route to the target, another error of connect(), or the target closed before it took the PROXY header.
        Unreachable => "unreachable",
        /// The guest answered REQUEST with RST: nobody listens there, or did until the client had waited long enough.
        GuestRst => "guest_rst",
        /// The guest did not answer REQUEST within `guestTimeout`.
        GuestTimeout => "guest_timeout",
        /// The target or the guest does not take connections of this type: SEQPACKET where only streams go, or the reverse.
        UnsupportedType => "unsupported_type",
        /// The sidecar is shutting down.
        Draining => "draining",
        /// The client of a `protocol: connect` listener sent no CONNECT line, a wrong one, or none in time.
        BadHandshake => "bad_handshake",
        /// The client of an inbound rule went away before the guest answered.
        ClientGone => "client_gone",
        /// The session or its rings ended before the connection was made.
        SessionLost => "session_lost",
        /// The guest broke the protocol before the connection was made.
        Misbehavior => "misbehavior",
    }
}

labelled! {
    /// How an established connection ended.
    CloseReason {
        /// The guest closed it (SHUTDOWN of both directions).
        GuestShutdown => "guest_shutdown",
        /// The guest reset it.
        GuestRst => "guest_rst",
        /// Both ends finished, the host end first.
        PeerFin => "peer_fin",
        /// The host end was reset or failed.
        PeerRst => "peer_rst",
        /// Nothing moved for `idleTimeout`.
        IdleTimeout => "idle_timeout",
        /// Cut off at the end of the drain period.
        Drain => "drain",
        /// The VMM, the guest or its rings went away.
        SessionLost => "session_lost",
        /// The guest broke the protocol; see `vsock_misbehavior_total`.
        Misbehavior => "misbehavior",
        /// A message of the host end is longer than the guest or the rule takes, or than the host's socket takes.
        MessageTooLong => "message_too_long",
        /// The service did not read, and `limits.memory` had no room for more of the guest's bytes.
        Memory => "memory",
        /// A failure of our own (for example a socket that could not be watched).
        Error => "error",
    }
}
