//! Calls to the inventory service: bounded in time and number, and safe to repeat.

use std::{future::Future, time::Duration};

use pillarbox::Kind;
use pillarbox_contracts::{
    ProductId, Quantity, ReleaseReason,
    http::{Availability, EndStatus, Refused, Release, ReservationEnd, Reserve, Reserved},
};
use pillarbox_host::http::{CORRELATION_HEADER, Correlation};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::{Deserialize, de::DeserializeOwned};
use uuid::Uuid;

/// `[orders.inventory]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientSettings {
    /// Where the inventory service answers. `shop` knows it by itself.
    pub url: Option<String>,
    /// How long one try may take. Defaults to 2 s.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// How often a call is tried. Defaults to 3.
    pub tries: u32,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            url: None,
            timeout: Duration::from_secs(2),
            tries: 3,
        }
    }
}

/// The wait after the first failed try; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(50);

/// Why there is no answer. What the call was to do may still happen.
#[derive(Debug)]
pub enum Away {
    /// Not reached, not in time, or in no state to answer: a later try may pass.
    Now(String),
    /// It answers, but to something else: a later try will not pass.
    Misunderstood(String),
}

impl std::fmt::Display for Away {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Now(text) | Self::Misunderstood(text) => f.write_str(text),
        }
    }
}

/// The inventory service, from outside. Cheap to clone.
#[derive(Debug, Clone)]
pub struct InventoryClient {
    http: reqwest::Client,
    base: Url,
    tries: u32,
}

impl InventoryClient {
    /// A client of the service at the configured address.
    ///
    /// # Errors
    /// [`Kind::Configuration`] without an address, or for one that is none.
    pub fn new(settings: &ClientSettings) -> pillarbox::Result<Self> {
        let wrong =
            |text: String| pillarbox::Error::new(Kind::Configuration, "read configuration", text);
        let expected =
            "expected the address of the inventory service, such as \"http://127.0.0.1:8081\"";
        let url = settings.url.as_deref();
        let url =
            url.ok_or_else(|| wrong(format!("orders.inventory.url: found nothing, {expected}")))?;
        let base = Url::parse(url)
            .ok()
            .filter(|base| base.scheme() == "http" && base.has_host())
            .ok_or_else(|| wrong(format!("orders.inventory.url: found {url:?}, {expected}")))?;
        let http = reqwest::Client::builder()
            .connect_timeout(settings.timeout)
            .timeout(settings.timeout)
            .build()
            .map_err(|e| {
                wrong("orders.inventory: no client can be made of it".to_owned()).caused_by(e)
            })?;
        Ok(Self {
            http,
            base,
            tries: settings.tries.max(1),
        })
    }

    /// Whether so much of a product could be reserved now: advice, asked for once.
    ///
    /// # Errors
    /// No answer.
    pub async fn availability(
        &self,
        product: &ProductId,
        quantity: Quantity,
        correlation: &Correlation,
    ) -> Result<Option<Availability>, Away> {
        let path = ["products", product.as_str(), "availability"];
        let query = format!("quantity={quantity}");
        let response = send(self.request(Method::GET, &path, Some(&query), correlation)).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        read(response, &[StatusCode::OK]).await.map(Some)
    }

    /// Reserves, or is refused. A repeat gets the same reservation.
    ///
    /// # Errors
    /// No answer.
    pub async fn reserve(
        &self,
        wanted: &Reserve,
        correlation: &Correlation,
    ) -> Result<Result<Reserved, Refused>, Away> {
        self.again_while_away(|| async {
            let request = self.request(Method::POST, &["reservations"], None, correlation);
            let response = send(request.json(wanted)).await?;
            if response.status() == StatusCode::CONFLICT {
                return read(response, &[StatusCode::CONFLICT]).await.map(Err);
            }
            read(response, &[StatusCode::CREATED]).await.map(Ok)
        })
        .await
    }

    /// Confirms a reservation. Answers how it really ended.
    ///
    /// # Errors
    /// No answer.
    pub async fn confirm(
        &self,
        reservation: Uuid,
        correlation: &Correlation,
    ) -> Result<EndStatus, Away> {
        let id = reservation.to_string();
        self.again_while_away(|| async {
            let path = ["reservations", id.as_str(), "confirm"];
            end(self.request(Method::POST, &path, None, correlation)).await
        })
        .await
    }

    /// Gives a reservation back, because its order is cancelled. Answers how it really ended.
    ///
    /// # Errors
    /// No answer.
    pub async fn release(
        &self,
        reservation: Uuid,
        correlation: &Correlation,
    ) -> Result<EndStatus, Away> {
        let id = reservation.to_string();
        let release = Release {
            reason: ReleaseReason::OrderCancelled,
        };
        self.again_while_away(|| async {
            let path = ["reservations", id.as_str(), "release"];
            end(self
                .request(Method::POST, &path, None, correlation)
                .json(&release))
            .await
        })
        .await
    }

    fn request(
        &self,
        method: Method,
        path: &[&str],
        query: Option<&str>,
        correlation: &Correlation,
    ) -> RequestBuilder {
        let mut url = self.base.clone();
        url.set_query(query);
        // An address with a host, as checked, has a path.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        self.http
            .request(method, url)
            .header(CORRELATION_HEADER, correlation.as_str())
    }

    async fn again_while_away<T, F>(&self, call: impl Fn() -> F) -> Result<T, Away>
    where
        F: Future<Output = Result<T, Away>>,
    {
        let mut wait = FIRST_WAIT;
        for _ in 1..self.tries {
            match call().await {
                Err(Away::Now(reason)) => tracing::debug!(%reason, "trying inventory again"),
                answer => return answer,
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
        }
        call().await
    }
}

async fn end(request: RequestBuilder) -> Result<EndStatus, Away> {
    let response = send(request).await?;
    let end: ReservationEnd = read(response, &[StatusCode::OK, StatusCode::CONFLICT]).await?;
    Ok(end.status)
}

async fn send(request: RequestBuilder) -> Result<Response, Away> {
    let sent = request.send().await;
    let answered = match &sent {
        Ok(response) => response.status().to_string(),
        Err(e) if e.is_timeout() => "time-out".to_owned(),
        Err(_) => "unreachable".to_owned(),
    };
    metrics::counter!("orders_inventory_calls_total", "answered" => answered).increment(1);
    let response = sent.map_err(|e| Away::Now(e.to_string()))?;
    if response.status().is_server_error() {
        let status = response.status();
        return Err(Away::Now(format!("inventory answered {status}")));
    }
    Ok(response)
}

async fn read<T: DeserializeOwned>(response: Response, wanted: &[StatusCode]) -> Result<T, Away> {
    let status = response.status();
    if !wanted.contains(&status) {
        return Err(Away::Misunderstood(format!("inventory answered {status}")));
    }
    response.json().await.map_err(|e| {
        if e.is_decode() {
            Away::Misunderstood(format!("inventory's answer cannot be read: {e}"))
        } else {
            Away::Now(e.to_string())
        }
    })
}
