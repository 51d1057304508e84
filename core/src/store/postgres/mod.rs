//! PostgreSQL.
use std::marker::PhantomData;
pub(crate) struct Postgres(PhantomData<()>);
