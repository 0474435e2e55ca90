//! A change of what may be changed of an instance, whatever it is doing: durable, then visible.
use std::sync::Arc;

use doze_host::conntrack::policy::Policy;

use crate::{
    EngineError,
    instance::{Instance, store_error},
};

/// On error nothing has changed.
pub async fn run(instance: &mut Instance, auto_standby: Policy) -> Result<(), EngineError> {
    let mut spec = (*instance.spec).clone();
    spec.auto_standby = Some(auto_standby);
    if spec == *instance.spec {
        return Ok(());
    }
    let document = instance.document(spec.clone(), (*instance.record).clone());
    let written = instance.ctx.store.update(&instance.id, document).await;
    written.map_err(store_error)?;
    instance.spec = Arc::new(spec);
    instance.publish();
    instance.note("its auto-standby policy was changed");
    Ok(())
}
