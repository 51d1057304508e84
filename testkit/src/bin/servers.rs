//! `pillarbox-servers [--demo] [postgres] [rabbitmq] [nats] -- COMMAND…` runs a command beside test servers and ends them after
//! it. Installs nothing. What it prints goes to stderr.

use std::io::Write as _;
use std::process::ExitCode;

const USAGE: &str = "\
usage: pillarbox-servers [--demo] [postgres] [rabbitmq] [nats] -- COMMAND [ARGUMENT…]

Starts the named servers on free ports of 127.0.0.1, runs COMMAND, ends the servers and exits with COMMAND's code.
COMMAND finds them in its environment: TEST_POSTGRES_URL, TEST_AMQP_URL, TEST_AMQP_CONTROL, TEST_NATS_URL,
TEST_NATS_ACCOUNTS.
A server whose address is in the environment already is used instead of one of our own.

  --demo   also make two databases, a vhost and an account, and put them where the shop's configuration looks for them:
           PILLARBOX_INVENTORY__STORE__URL, PILLARBOX_ORDERS__STORE__URL, PILLARBOX_TRANSPORT__AMQP__URL,
           PILLARBOX_TRANSPORT__NATS__URL.
           What is set already stays as it is, and a server that only they would need is not started.

Exit code: COMMAND's; 128 and the signal's number when a signal ended it; 2 when a server is missing; 1 when one failed.";

#[cfg(not(unix))]
fn main() -> ExitCode {
    say("this program needs a Unix system");
    ExitCode::from(2)
}

#[cfg(unix)]
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match unix::Request::parse(std::env::args().skip(1)) {
        Ok(Some(request)) => ExitCode::from(unix::run(request).await),
        Ok(None) => {
            say(USAGE);
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("pillarbox-servers: {error}\n{USAGE}"));
            ExitCode::from(2)
        }
    }
}

/// To stderr, which may be closed.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(unix)]
mod unix {
    use std::io::IsTerminal as _;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use pillarbox_testkit::servers::{Nats, Postgres, RabbitMq, ServerError};
    use rustix::process::{Pid, Signal, getpgrp, kill_process};
    use tokio::process::{Child, Command};
    use tokio::signal::unix::{SignalKind, signal};

    use super::say;

    const STORES: [&str; 2] = [
        "PILLARBOX_INVENTORY__STORE__URL",
        "PILLARBOX_ORDERS__STORE__URL",
    ];
    const TRANSPORT: &str = "PILLARBOX_TRANSPORT__AMQP__URL";
    const NATS: &str = "PILLARBOX_TRANSPORT__NATS__URL";

    /// What the command line asks for.
    #[derive(Debug, Default, PartialEq)]
    pub(super) struct Request {
        demo: bool,
        postgres: bool,
        rabbitmq: bool,
        nats: bool,
        command: Vec<String>,
    }

    impl Request {
        /// `None` when help is asked for.
        pub(super) fn parse(
            mut words: impl Iterator<Item = String>,
        ) -> Result<Option<Self>, String> {
            let mut request = Self::default();
            for word in words.by_ref() {
                match word.as_str() {
                    "--demo" => request.demo = true,
                    "postgres" => request.postgres = true,
                    "rabbitmq" => request.rabbitmq = true,
                    "nats" => request.nats = true,
                    "--help" | "-h" => return Ok(None),
                    "--" => break,
                    other => return Err(format!("unknown word {other:?}")),
                }
            }
            request.command = words.collect();
            if request.command.is_empty() {
                return Err("no command after --".into());
            }
            Ok(Some(request))
        }

        /// Leaves out the servers that the demo would not use, since their addresses are given.
        fn without_given(mut self, given: impl Fn(&str) -> bool) -> Self {
            if self.demo {
                self.postgres &= !STORES.iter().all(|name| given(name));
                self.rabbitmq &= !given(TRANSPORT);
                self.nats &= !given(NATS);
            }
            self
        }
    }

    #[derive(Default)]
    struct Servers {
        postgres: Option<Postgres>,
        rabbitmq: Option<RabbitMq>,
        nats: Option<Nats>,
    }

    impl Servers {
        async fn end(self) {
            let postgres = async {
                if let Some(server) = self.postgres {
                    server.end().await;
                }
            };
            let rabbitmq = async {
                if let Some(server) = self.rabbitmq {
                    server.end().await;
                }
            };
            let nats = async {
                if let Some(server) = self.nats {
                    server.end().await;
                }
            };
            tokio::join!(postgres, rabbitmq, nats);
        }

        /// What the command shall find in its environment.
        async fn environment(&self, demo: bool) -> Result<Vec<(String, String)>, ServerError> {
            let mut environment = Vec::new();
            if let Some(server) = &self.postgres {
                environment.extend(server.environment());
                for name in STORES.into_iter().filter(|name| demo && !is_set(name)) {
                    environment.push((name.to_owned(), server.create_database().await?));
                }
            }
            if let Some(server) = &self.rabbitmq {
                environment.extend(server.environment());
                if demo && !is_set(TRANSPORT) {
                    environment.push((TRANSPORT.to_owned(), server.create_vhost().await?));
                }
            }
            if let Some(server) = &self.nats {
                environment.extend(server.environment());
                if demo && !is_set(NATS) {
                    environment.push((NATS.to_owned(), server.create_account()?));
                }
            }
            Ok(environment)
        }
    }

    fn is_set(name: &str) -> bool {
        std::env::var_os(name).is_some_and(|value| !value.is_empty())
    }

    pub(super) async fn run(request: Request) -> u8 {
        let request = request.without_given(is_set);
        // From here on: a signal must not end this program before it has ended what it started.
        let mut signals = match Signals::catch() {
            Ok(signals) => signals,
            Err(error) => {
                say(&format!(
                    "pillarbox-servers: cannot watch for signals: {error}"
                ));
                return 1;
            }
        };
        let mut servers = Servers::default();
        let prepared = tokio::select! {
            prepared = start(&request, &mut servers) => prepared,
            caught = signals.next() => {
                servers.end().await;
                return 128 + caught.number();
            }
        };
        let code = match prepared {
            Ok(environment) => command(&request.command, environment, &mut signals).await,
            Err(error) => {
                say(&format!("pillarbox-servers: {error}"));
                if error.is_missing() { 2 } else { 1 }
            }
        };
        servers.end().await;
        code
    }

    async fn start(
        request: &Request,
        servers: &mut Servers,
    ) -> Result<Vec<(String, String)>, ServerError> {
        let postgres = async {
            if request.postgres {
                Postgres::given_or_started().await.map(Some)
            } else {
                Ok(None)
            }
        };
        let rabbitmq = async {
            if request.rabbitmq {
                RabbitMq::given_or_started().await.map(Some)
            } else {
                Ok(None)
            }
        };
        let nats = async {
            if request.nats {
                Nats::given_or_started().await.map(Some)
            } else {
                Ok(None)
            }
        };
        let (postgres, rabbitmq, nats) = tokio::join!(postgres, rabbitmq, nats);
        // What runs is kept before an error returns: it must be ended, and waited for.
        let mut errors = Vec::new();
        match postgres {
            Ok(server) => servers.postgres = server,
            Err(error) => errors.push(error),
        }
        match rabbitmq {
            Ok(server) => servers.rabbitmq = server,
            Err(error) => errors.push(error),
        }
        match nats {
            Ok(server) => servers.nats = server,
            Err(error) => errors.push(error),
        }
        let Some(last) = errors.pop() else {
            return servers.environment(request.demo).await;
        };
        for error in errors {
            say(&format!("pillarbox-servers: {error}"));
        }
        Err(last)
    }

    async fn command(
        words: &[String],
        environment: Vec<(String, String)>,
        signals: &mut Signals,
    ) -> u8 {
        let Some((program, arguments)) = words.split_first() else {
            return 2;
        };
        let mut child = match Command::new(program)
            .args(arguments)
            .envs(environment)
            .spawn()
        {
            Ok(child) => child,
            Err(error) => {
                say(&format!("pillarbox-servers: cannot run {program}: {error}"));
                return 127;
            }
        };
        loop {
            tokio::select! {
                ended = child.wait() => return ended.map_or(1, code),
                caught = signals.next() => caught.pass_on(&child),
            }
        }
    }

    /// What a shell would give as `$?`.
    fn code(status: ExitStatus) -> u8 {
        let number = status
            .code()
            .or_else(|| status.signal().map(|signal| 128 + signal))
            .unwrap_or(1);
        u8::try_from(number).unwrap_or(1)
    }

    struct Signals {
        interrupt: tokio::signal::unix::Signal,
        terminate: tokio::signal::unix::Signal,
        hangup: tokio::signal::unix::Signal,
    }

    impl Signals {
        fn catch() -> std::io::Result<Self> {
            Ok(Self {
                interrupt: signal(SignalKind::interrupt())?,
                terminate: signal(SignalKind::terminate())?,
                hangup: signal(SignalKind::hangup())?,
            })
        }

        async fn next(&mut self) -> Caught {
            tokio::select! {
                _ = self.interrupt.recv() => Caught(Signal::INT),
                _ = self.terminate.recv() => Caught(Signal::TERM),
                _ = self.hangup.recv() => Caught(Signal::HUP),
            }
        }
    }

    struct Caught(Signal);

    impl Caught {
        fn number(&self) -> u8 {
            u8::try_from(self.0.as_raw()).unwrap_or_default()
        }

        /// Gives the signal to the command, unless it has it already.
        fn pass_on(&self, child: &Child) {
            // Ctrl-C at a terminal reaches the whole foreground group. A second one would mean "stop at once".
            if self.0 != Signal::TERM && in_terminal_foreground() {
                return;
            }
            let pid = child
                .id()
                .and_then(|pid| i32::try_from(pid).ok())
                .and_then(Pid::from_raw);
            if let Some(pid) = pid {
                let _ = kill_process(pid, self.0);
            }
        }
    }

    fn in_terminal_foreground() -> bool {
        let stdin = std::io::stdin();
        stdin.is_terminal()
            && rustix::termios::tcgetpgrp(&stdin).is_ok_and(|group| group == getpgrp())
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn parse(line: &str) -> Result<Option<Request>, String> {
            Request::parse(line.split_whitespace().map(str::to_owned))
        }

        #[test]
        fn words_before_the_dashes_are_ours() {
            let request = parse("postgres -- sh postgres --demo").unwrap().unwrap();
            assert!(request.postgres && !request.rabbitmq && !request.nats && !request.demo);
            assert_eq!(request.command, ["sh", "postgres", "--demo"]);
            assert_eq!(parse("--help").unwrap(), None);
            assert!(parse("kafka -- true").unwrap_err().contains("kafka"));
            assert!(parse("postgres").is_err());
            assert!(parse("postgres --").is_err());
        }

        #[test]
        fn the_demo_starts_nothing_for_addresses_that_are_given() {
            let demo = || parse("--demo postgres rabbitmq -- true").unwrap().unwrap();
            assert!(demo().without_given(|_| false).postgres);
            assert!(
                demo().without_given(|name| name == STORES[0]).postgres,
                "the other store needs it"
            );
            let request = demo().without_given(|name| STORES.contains(&name));
            assert!(!request.postgres && request.rabbitmq);
            assert!(!demo().without_given(|name| name == TRANSPORT).rabbitmq);
            let nats = parse("--demo nats -- true").unwrap().unwrap();
            assert!(!nats.without_given(|name| name == NATS).nats);
        }
    }
}
