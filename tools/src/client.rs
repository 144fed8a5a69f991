//! HTTP to the control plane.

use std::time::Duration;

use controlplane::api::Problem;
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::Config;
use crate::exit::Failure;

/// To get a connection. The control plane is near, or not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For an answer beyond what a request waits for by itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest answer that is read whole; a page of a thousand machines has about 1 MiB.
const ANSWER_BYTES_MAX: usize = 32 << 20;

/// Talks to one control plane.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    /// What the user knows it by.
    shown: String,
    /// What requests begin with.
    base: String,
    token: Option<String>,
}

impl Client {
    /// Makes a client; nothing is sent yet.
    ///
    /// # Errors
    /// When the URL is of no known form.
    pub fn new(config: &Config) -> Result<Self, Failure> {
        // Images are fetched over TLS by a library that leaves the choice of its cryptography to us; whoever chose before has chosen the same.
        let _chosen = rustls::crypto::ring::default_provider().install_default();
        // A proxy for the web has no business with the control plane.
        let builder = reqwest::Client::builder().no_proxy().connect_timeout(CONNECT_TIMEOUT);
        let (builder, base) = if let Some(path) = config.url.strip_prefix("unix:") {
            (builder.unix_socket(path), "http://localhost".to_owned())
        } else if config.url.starts_with("http://") {
            (builder, config.url.trim_end_matches('/').to_owned())
        } else {
            return Err(Failure::usage(
                format!("`{}` is not the address of a control plane", config.url),
                "use http://IP:PORT or unix:PATH (TLS is not spoken: forward a port over ssh, for example)",
            ));
        };
        let http = builder
            .build()
            .map_err(|error| Failure::local("preparing HTTP", error, "report this as a defect"))?;
        Ok(Self { http, shown: config.url.clone(), base, token: config.token.clone() })
    }

    /// `GET`, parsed.
    ///
    /// # Errors
    /// [`Failure`], with the control plane's own problem if it had one.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.request(Method::GET, path, None::<&()>, Duration::ZERO).await
    }

    /// `GET` of something that takes up to `wait` to answer.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn get_waiting<T: DeserializeOwned>(&self, path: &str, wait: Duration) -> Result<T, Failure> {
        self.request(Method::GET, path, None::<&()>, wait).await
    }

    /// `POST`, parsed. Carries a key, so that a repetition by the network stack cannot do it twice.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        self.request(Method::POST, path, Some(body), Duration::ZERO).await
    }

    /// `DELETE`, parsed.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.request(Method::DELETE, path, None::<&()>, Duration::ZERO).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        wait: Duration,
    ) -> Result<T, Failure> {
        let mut request =
            self.http.request(method, format!("{}{path}", self.base)).timeout(wait + ANSWER_TIMEOUT);
        if let Some(body) = body {
            request = request.json(body).header("idempotency-key", random_hex::<16>()?);
        }
        let response = self.send(request).await?;
        let bytes = self.whole(response).await?;
        serde_json::from_slice(&bytes).map_err(|error| Failure::Answer(error.to_string()))
    }

    /// `GET` whose answer is read bit by bit, with no limit in time.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn open(&self, path: &str, last_event_id: Option<u64>) -> Result<Response, Failure> {
        let mut request = self.http.get(format!("{}{path}", self.base));
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        self.send(request).await
    }

    /// Has the connection of a `GET` upgraded to `protocol`, and gives its bytes.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn upgrade(&self, path: &str, protocol: &str) -> Result<reqwest::Upgraded, Failure> {
        let request = self.http.get(format!("{}{path}", self.base));
        let request = request.header("connection", "upgrade").header("upgrade", protocol);
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Failure::Answer(format!("HTTP status {} to an upgrade", response.status())));
        }
        response.upgrade().await.map_err(|error| self.unreachable(&error))
    }

    async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<Response, Failure> {
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let bytes = self.whole(response).await?;
        Err(problem(status, &bytes))
    }

    /// Reads an answer whole, up to its bound.
    ///
    /// # Errors
    /// When the connection breaks or the answer is too long.
    pub async fn whole(&self, mut response: Response) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
            if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(Failure::Answer(format!("an answer above {ANSWER_BYTES_MAX} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// The connection failed.
    pub fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let mut detail = String::new();
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        // The outermost text only repeats the URL.
        if error.source().is_some() {
            cause = error.source();
        }
        while let Some(error) = cause {
            if !detail.is_empty() {
                detail.push_str(": ");
            }
            detail.push_str(&error.to_string());
            cause = error.source();
        }
        Failure::Unreachable { url: self.shown.clone(), detail }
    }
}

use std::error::Error as _;

fn problem(status: StatusCode, bytes: &[u8]) -> Failure {
    match serde_json::from_slice::<Problem>(bytes) {
        Ok(problem) => problem.into(),
        Err(_) => Failure::Answer(format!("HTTP status {status}, and no problem that this release knows")),
    }
}

/// Random bytes in hex.
///
/// # Errors
/// When the system gives no randomness.
pub fn random_hex<const BYTES: usize>() -> Result<String, Failure> {
    let mut bytes = [0; BYTES];
    rustls::crypto::ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| Failure::Failed {
        detail: "the system gives no random numbers".to_owned(),
        remedy: "look at /dev/urandom".to_owned(),
    })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
