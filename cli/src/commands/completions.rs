use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::{answer, arguments::Arguments, failure::Result};

/// Print a shell's completions for this program.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox completions bash > /etc/bash_completion.d/pillarbox
  pillarbox completions zsh > \"${fpath[1]}/_pillarbox\"
  pillarbox completions fish > ~/.config/fish/completions/pillarbox.fish")]
pub(crate) struct Completions {
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(
            self.shell,
            &mut Arguments::command(),
            "pillarbox",
            &mut script,
        );
        answer::write(&String::from_utf8_lossy(&script))
    }
}
