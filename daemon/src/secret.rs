//! The secret that signs bearer tokens, and the tokens.
//!
//! Tokens are JWTs signed with HS256 (RFC 7519, RFC 7515). A token that carries `exp` or `nbf` is
//! held to it; one without is good until the secret changes, which is the operator's choice, for
//! only the holder of the secret can make one.
//!
//! Every token that is good may do everything. Other systems sign tokens that may do less and say so
//! in a claim (`permissions`, `scope`, `aud`, ...). A claim that this server does not understand must
//! never widen access, so such a token is refused: [`UNDERSTOOD`] lists what a token may say.
use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::{Config, Secret};

/// Random bytes of a generated secret, see [`Secret::MIN_BYTES`].
const SECRET_BYTES: usize = 48;
/// A secret file holds no more than this.
const MAX_SECRET_FILE: u64 = 64 << 10;
/// Clocks of client and server may differ by this.
const LEEWAY_SECONDS: u64 = 5;

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("{path}: {context}")]
    File {
        path: PathBuf,
        context: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{path}: {reason}")]
    Content { path: PathBuf, reason: String },
    #[error(
        "{path} is not there: start the server once, or set auth.jwt_secret in the configuration"
    )]
    Absent { path: PathBuf },
    #[error("sign the token")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// The configured secret, else the one generated earlier; never makes one.
pub(crate) fn existing(config: &Config) -> Result<Secret, SecretError> {
    match &config.auth.jwt_secret {
        Some(secret) => Ok(secret.clone()),
        None => {
            let path = config.secret_path();
            read(&path)?.ok_or(SecretError::Absent { path })
        }
    }
}

/// The configured secret, else the generated one, which is made when it is not there. The data
/// folder must exist and be ours alone.
pub(crate) fn existing_or_new(config: &Config) -> Result<Secret, SecretError> {
    if let Some(secret) = &config.auth.jwt_secret {
        return Ok(secret.clone());
    }
    let path = config.secret_path();
    if let Some(secret) = read(&path)? {
        return Ok(secret);
    }
    let text = URL_SAFE_NO_PAD.encode(rand::random::<[u8; SECRET_BYTES]>());
    doze_host::files::write_atomic(&path, text.as_bytes(), 0o600).map_err(|source| {
        SecretError::File {
            path: path.clone(),
            context: "write the generated secret",
            source,
        }
    })?;
    tracing::info!(path = %path.display(), "generated the secret that signs tokens");
    Ok(Secret::new(text))
}

fn read(path: &Path) -> Result<Option<Secret>, SecretError> {
    let failed = |context| {
        move |source| SecretError::File {
            path: path.to_owned(),
            context,
            source,
        }
    };
    let content = |reason: String| SecretError::Content {
        path: path.to_owned(),
        reason,
    };
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed("look at the secret"))?,
    };
    if !metadata.is_file() || metadata.len() > MAX_SECRET_FILE {
        return Err(content("not a small regular file".to_owned()));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(content(format!(
            "mode {:o} lets others read the secret; make it 600 and think about a new one",
            metadata.mode() & 0o777
        )));
    }
    let text = fs::read_to_string(path).map_err(failed("read the secret"))?;
    match text.trim() {
        "" => Err(content(
            "empty; remove the file to have a new secret generated".to_owned(),
        )),
        text if text.len() < Secret::MIN_BYTES => Err(content(format!(
            "the secret has {} bytes; allowed: at least {} random bytes. hint: remove the file to have a new secret generated",
            text.len(),
            Secret::MIN_BYTES
        ))),
        text => Ok(Some(Secret::new(text))),
    }
}

/// Claims of the tokens we make.
#[derive(Debug, Serialize)]
struct OwnClaims<'a> {
    sub: &'a str,
    iat: u64,
    exp: u64,
}

/// Makes a token for `subject` that is good for `ttl`.
pub fn token(config: &Config, subject: &str, ttl: Duration) -> Result<String, SecretError> {
    sign(&existing(config)?, subject, ttl)
}

pub(crate) fn sign(secret: &Secret, subject: &str, ttl: Duration) -> Result<String, SecretError> {
    // A clock before 1970 makes a token that has already expired, which is the safe answer.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let claims = OwnClaims {
        sub: subject,
        iat: now,
        exp: now.saturating_add(ttl.as_secs()),
    };
    Ok(jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &claims,
        &EncodingKey::from_secret(secret.expose().as_bytes()),
    )?)
}

/// Claims of a token that is good.
#[derive(Debug, Clone)]
pub(crate) struct Claims {
    pub sub: Option<String>,
}

/// Claims that a token may have (RFC 7519 section 4.1). `exp` and `nbf` restrict it and are enforced;
/// the others say who made it, when and for whom, and restrict nothing. `aud` is not among them: a
/// server that is not named there must reject the token (section 4.1.3), and this one has no name.
pub(crate) const UNDERSTOOD: [&str; 6] = ["sub", "iat", "exp", "nbf", "iss", "jti"];

/// Why a token is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error(transparent)]
    Invalid(#[from] jsonwebtoken::errors::Error),
    /// Signed with the secret, but it says more than this server understands.
    #[error(
        "the token's claim {claim:?} {reason}; allowed claims: {}. hint: doze token prints a token without restrictions",
        UNDERSTOOD.join(", ")
    )]
    Claim { claim: String, reason: &'static str },
}

/// Checks tokens.
#[derive(Clone)]
pub(crate) struct Verifier {
    key: DecodingKey,
    validation: Validation,
}

impl Verifier {
    pub(crate) fn new(secret: &Secret) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.required_spec_claims = HashSet::new();
        validation.validate_nbf = true;
        // `understood` refuses the claim with an answer that names it.
        validation.validate_aud = false;
        validation.leeway = LEEWAY_SECONDS;
        Self {
            key: DecodingKey::from_secret(secret.expose().as_bytes()),
            validation,
        }
    }

    pub(crate) fn verify(&self, token: &str) -> Result<Claims, Refused> {
        let data = jsonwebtoken::decode::<Map<String, Value>>(token, &self.key, &self.validation)?;
        understood(&data.claims)
    }
}

/// What the claims say, if this server understands every one of them.
fn understood(claims: &Map<String, Value>) -> Result<Claims, Refused> {
    let refused = |claim: &str, reason| Refused::Claim {
        claim: claim.to_owned(),
        reason,
    };
    if let Some(claim) = claims
        .keys()
        .find(|claim| !UNDERSTOOD.contains(&claim.as_str()))
    {
        return Err(refused(
            claim,
            "may restrict it in a way that this server does not understand",
        ));
    }
    match claims.get("sub") {
        None => Ok(Claims { sub: None }),
        Some(Value::String(sub)) => Ok(Claims {
            sub: Some(sub.clone()),
        }),
        Some(_) => Err(refused("sub", "is not a text")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn config(dir: &Path) -> Config {
        let variables = [("DOZE_DATA_DIR".to_owned(), dir.display().to_string())];
        Config::parse(None, variables).unwrap()
    }

    #[test]
    fn a_secret_is_generated_once_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        assert!(matches!(
            token(&config, "me", Duration::from_secs(60)),
            Err(SecretError::Absent { .. })
        ));
        let first = existing_or_new(&config).unwrap();
        assert_eq!(existing_or_new(&config).unwrap(), first);
        assert_eq!(existing(&config).unwrap(), first);
        assert!(first.expose().len() >= 64);
        let mode = fs::metadata(config.secret_path()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let token = token(&config, "me", Duration::from_secs(60)).unwrap();
        let claims = Verifier::new(&first).verify(&token).unwrap();
        assert_eq!(claims.sub.as_deref(), Some("me"));
    }

    #[test]
    fn a_secret_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        fs::write(config.secret_path(), "x").unwrap();
        fs::set_permissions(config.secret_path(), fs::Permissions::from_mode(0o644)).unwrap();
        let error = existing(&config).unwrap_err();
        assert!(error.to_string().contains("600"), "{error}");
    }

    #[test]
    fn a_short_secret_file_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let path = config.secret_path();
        fs::write(&path, "too-short").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let error = existing_or_new(&config).unwrap_err().to_string();
        assert!(error.contains("at least 32"), "{error}");
        assert!(!error.contains("too-short"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "too-short");
    }

    #[test]
    fn only_good_tokens_pass() {
        let secret = Secret::new("s".repeat(32));
        let verifier = Verifier::new(&secret);
        let make = |header: Header, claims: serde_json::Value, secret: &str| {
            let key = EncodingKey::from_secret(secret.as_bytes());
            jsonwebtoken::encode(&header, &claims, &key).unwrap()
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let hs256 = || Header::new(Algorithm::HS256);
        let ours = secret.expose();
        let good = [
            serde_json::json!({}),
            serde_json::json!({"sub": "x", "iss": "y", "jti": "z", "iat": now, "nbf": now, "exp": now + 60}),
            serde_json::json!({"exp": now as f64 + 60.5}),
        ];
        for claims in good {
            let token = make(hs256(), claims, ours);
            assert!(verifier.verify(&token).is_ok());
        }
        for (header, claims, secret) in [
            (hs256(), serde_json::json!({}), "other"),
            (hs256(), serde_json::json!({"exp": now - 60}), ours),
            (hs256(), serde_json::json!({"nbf": now + 60}), ours),
            (hs256(), serde_json::json!({"sub": ["x"]}), ours),
            // A time that cannot be read must not become none.
            (hs256(), serde_json::json!({"exp": "1"}), ours),
            (hs256(), serde_json::json!({"exp": -1}), ours),
            (hs256(), serde_json::json!({"nbf": "x"}), ours),
            (Header::new(Algorithm::HS384), serde_json::json!({}), ours),
        ] {
            assert!(verifier.verify(&make(header, claims, secret)).is_err());
        }
        // What may restrict a token is not understood, so it must not widen what the token may do.
        for (claim, value) in [
            ("permissions", serde_json::json!(["instances:read"])),
            ("permissions", serde_json::json!([])),
            ("scope", serde_json::json!("read")),
            ("scopes", serde_json::json!(["read"])),
            ("repo_access", serde_json::json!([])),
            ("build_id", serde_json::json!("b")),
            ("aud", serde_json::json!("another server")),
            ("cnf", serde_json::json!({"jkt": "x"})),
            ("a new claim", serde_json::Value::Null),
        ] {
            let token = make(hs256(), serde_json::json!({ claim: value }), ours);
            match verifier.verify(&token) {
                Err(Refused::Claim { claim: named, .. }) => assert_eq!(named, claim),
                other => panic!("{claim}: {other:?}"),
            }
            // Without the secret, the answer says nothing about claims.
            let token = make(hs256(), serde_json::json!({ claim: 1 }), "other");
            assert!(matches!(verifier.verify(&token), Err(Refused::Invalid(_))));
        }
        // {"alg":"none"} with an empty signature.
        assert!(verifier.verify("eyJhbGciOiJub25lIn0.e30.").is_err());
        assert!(verifier.verify("").is_err());
    }
}
