//! Who this guest is. Init makes it so at boot; a copy of a running guest, which does not boot, is told.
use std::{cell::RefCell, path::Path};

use doze_agent::{config::GuestConfig, message::Identity};

use super::{
    files::{self, Named},
    network,
};

/// What init made of this guest so far.
#[derive(Debug)]
pub struct Me(RefCell<Named>);

impl Me {
    pub fn of(config: &GuestConfig) -> Self {
        Self(RefCell::new(Named::of(config)))
    }

    /// Becomes somebody else: host name, files, then the network. Returns the former host name. May be
    /// called again, also after it failed half way.
    ///
    /// # Errors
    /// Everything that failed, in words; each step is tried.
    pub fn take(&self, identity: &Identity) -> Result<String, String> {
        identity.check().map_err(|e| e.to_string())?;
        let former = self.0.borrow().clone();
        let now = Named {
            hostname: identity.hostname.clone(),
            network: identity.network.clone(),
        };
        let named = files::set_hostname(&now.hostname).map_err(|e| e.to_string());
        let written = files::rename(Path::new("/"), &former, &now, identity)
            .map_err(|e| format!("writing to /etc: {e}"));
        let readdressed = match (&former.network, &now.network) {
            (Some(former), Some(now)) => network::readdress(former, now).map_err(|e| e.to_string()),
            (None, None) => Ok(()),
            // Its address would stay another guest's.
            (Some(_), None) => Err("network: this guest has one, its new identity has none".into()),
            (None, Some(_)) => Err("network: this guest has none, its new identity has one".into()),
        };
        let failed: Vec<_> = [named, written, readdressed]
            .into_iter()
            .filter_map(Result::err)
            .collect();
        if !failed.is_empty() {
            return Err(failed.join("; "));
        }
        *self.0.borrow_mut() = now;
        Ok(former.hostname)
    }
}
