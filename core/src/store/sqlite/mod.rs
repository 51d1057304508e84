//! SQLite.
use std::marker::PhantomData;
pub(crate) struct Sqlite(PhantomData<()>);
