//! What goes wrong, and how it is told: a sentence or a JSON object on standard error, and an exit code.

use std::error::Error;
use std::fmt::Display;
use std::io::Write;
use std::path::Path;
use std::process;

use carrick_ctl::fault::{self, Fault, Reason};
use tonic::Status;

/// Why the command failed.
#[derive(Debug)]
pub struct Problem {
    code: fault::ExitCode,
    reason: String,
    subject: String,
    message: String,
}

impl Problem {
    /// Something on this side of the socket failed.
    pub fn local(error: impl Display) -> Self {
        Fault::new(Reason::Internal, "carrick", error.to_string()).into()
    }

    /// The command line makes no sense.
    pub fn usage(error: &clap::Error) -> Self {
        let text = error.to_string();
        let message = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
        Self { code: fault::ExitCode::Usage, reason: "USAGE".into(), subject: "command line".into(), message: message.into() }
    }

    /// The daemon doesn't answer.
    pub fn unreachable(socket: &Path, why: impl Display) -> Self {
        let message = format!("carrickd can't be reached at {}: {why}", socket.display());
        Fault::new(Reason::DaemonUnreachable, socket.display(), message).into()
    }

    /// What happened, in words.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Tells it; returns the exit code.
    pub fn report(&self, json: bool) -> process::ExitCode {
        let code = self.code as u8;
        let text = if json {
            serde_json::json!({ "code": code, "reason": self.reason, "subject": self.subject, "message": self.message }).to_string()
        } else {
            format!("carrick: {}", self.message)
        };
        // Nobody to tell if this fails.
        let _ = writeln!(std::io::stderr(), "{text}");
        process::ExitCode::from(code)
    }
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        let Fault { reason, subject, message } = fault;
        Self { code: reason.exit_code(), reason: reason.as_str().to_owned(), subject, message }
    }
}

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        let code = fault::exit_code(&status);
        match fault::detail(&status) {
            Some(detail) => Self { code, reason: detail.reason, subject: detail.subject, message: detail.message },
            // Whatever has a cause on this side isn't an answer: the connection broke, or it took too long.
            None if let Some(cause) = status.source() => {
                let message =
                    format!("carrickd has gone away, or doesn't answer ({}); what was asked for may be done, or not", root(cause));
                Fault::new(Reason::DaemonUnreachable, "carrickd", message).into()
            }
            None => {
                let message = format!("carrickd answered {:?}: {}", status.code(), status.message());
                Self { code, reason: format!("{:?}", status.code()), subject: String::new(), message }
            }
        }
    }
}

/// What it all comes from: what is above that only says that there was something.
fn root<'a>(mut error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    while let Some(cause) = error.source() {
        error = cause;
    }
    error
}
