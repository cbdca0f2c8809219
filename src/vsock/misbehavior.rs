//! What a guest did wrong, by name. Values for counters, logs and tests; never an error of ours.

use super::reason::labelled;

labelled! {
    /// A violation of the virtio-vsock protocol (virtio 1.2, section 5.10.6) by the driver.
    ///
    /// It costs the guest the connection concerned, if there is one, and one count of
    /// `vsock_misbehavior_total{kind}`. The packet is consumed all the same.
    Misbehavior {
        /// `src_cid` is not the guest's own. The packet is dropped: there is nobody to answer.
        WrongSourceCid => "wrong_source_cid",
        /// `type` is no socket type of the standard. Answered with RST.
        UnknownType => "unknown_type",
        /// `type` is a socket type that was not negotiated, or not the connection's. Answered with RST.
        UnsupportedType => "unsupported_type",
        /// `op` is no operation of the standard. Answered with RST.
        UnknownOp => "unknown_op",
        /// REQUEST for a connection that exists, and that is no repetition of an unanswered one.
        DuplicateRequest => "duplicate_request",
        /// RESPONSE that answers no REQUEST.
        UnexpectedResponse => "unexpected_response",
        /// RW or SHUTDOWN before the connection is established. (Linux sends CREDIT_UPDATE then, when an application
        /// sets its buffer size while it connects.)
        NotEstablished => "not_established",
        /// RW after SHUTDOWN(SEND).
        DataAfterShutdown => "data_after_shutdown",
        /// RW beyond the credit that `buf_alloc` and `fwd_cnt` gave.
        CreditExceeded => "credit_exceeded",
        /// `fwd_cnt` claims more bytes than were sent.
        FwdCntBeyondSent => "fwd_cnt_beyond_sent",
        /// `len` is larger than the descriptor chain.
        PayloadShort => "payload_short",
        /// A message of a SEQPACKET connection that fills the whole receive buffer and does not end: it never could.
        MessageTooLong => "message_too_long",
        /// SHUTDOWN(SEND) in the midst of a message.
        MessageCut => "message_cut",
        /// Very many empty messages that the host end does not take; they need no credit.
        EmptyMessages => "empty_messages",
        /// An operation other than RW with a payload. The payload is ignored.
        UnexpectedPayload => "unexpected_payload",
    }
}
