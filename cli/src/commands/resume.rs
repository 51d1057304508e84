use clap::Args;

use super::pause::What;
use crate::{
    failure::Result,
    place::{By, Place},
    shape,
};

/// End a pause now.
///
/// Whoever runs goes on within about a second, in order.
#[derive(Args)]
#[command(after_help = "\
Examples:
  pillarbox resume --config shop.toml --destination main
  pillarbox resume --config shop.toml --group billing --topic shop.events --key order-7 --why 'it is mended'")]
pub(crate) struct Resume {
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    by: By,
}

impl Resume {
    pub(crate) async fn run(self) -> Result<()> {
        let target = self.what.target()?;
        let admin = self.place.admin(&self.by.operator()).await?;
        let paused = admin.resume(&target, &self.by.why).await?;
        let shape = shape::Pause::from(&paused);
        self.place
            .answer()
            .give(&shape, || format!("{target} goes on"))
    }
}
