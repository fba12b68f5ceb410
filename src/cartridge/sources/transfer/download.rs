//! Files, which may be large: written as they come, continued after a cut, checked against what was announced.

use std::{io::Read, time::Instant};

use ureq::http::{HeaderMap, Method, StatusCode, header};

use super::{Content, Failure, Reply, Request, Transfer};
use crate::cartridge::store::{Partial, hex};

/// What is known of a file before it comes. The content is checked against all of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// Bytes.
    pub size: Option<u64>,
    pub sha256: Option<[u8; 32]>,
    pub md5: Option<[u8; 16]>,
}

/// How a download ended well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivered {
    /// The partial file is whole, and its ETag.
    Whole(Option<String>),
    /// The request said `If-None-Match`, and nothing else is there.
    NotModified,
}

/// How one try ended.
enum Try {
    Done(Delivered),
    /// The content there is another one now, or continuing went wrong: from the start, once.
    FromStart(Failure),
}

impl Transfer {
    /// Downloads into `partial`, going on where it stands. Bytes that came stay there if the rest does not.
    ///
    /// # Errors
    /// [`Failure`]. Content that is not as expected is thrown away.
    pub fn download(
        &self,
        request: &Request,
        expected: &Expected,
        partial: &mut Partial,
        max_bytes: u64,
        deadline: Instant,
    ) -> Result<Delivered, Failure> {
        let mut restarts = 0;
        loop {
            let tried = self.again(deadline, || {
                self.try_download(request, expected, partial, max_bytes, deadline)
            })?;
            match tried {
                Try::Done(delivered) => return Ok(delivered),
                Try::FromStart(failure) if restarts > 0 => return Err(failure),
                Try::FromStart(_) => restarts += 1,
            }
        }
    }

    fn try_download(
        &self,
        request: &Request,
        expected: &Expected,
        partial: &mut Partial,
        max_bytes: u64,
        deadline: Instant,
    ) -> Result<Try, Failure> {
        let mut request = request.clone();
        // Without a validator only a digest tells whether both parts are of one content.
        let is_checked = expected.sha256.is_some() || expected.md5.is_some();
        if !partial.is_empty() && partial.validator().is_none() && !is_checked {
            partial.restart(None)?;
        }
        let have = partial.len();
        let is_whole = have > 0 && expected.size == Some(have) && is_checked;
        if have > 0 && !is_whole {
            request = request.with("range", &format!("bytes={have}-"));
            if let Some(etag) = partial.validator() {
                request = request.with("if-range", etag);
            }
        }
        let mut expected = expected.clone();
        let mut etag = partial.validator().map(str::to_owned);
        let host = match is_whole {
            true => request.address.host().to_owned(),
            false => {
                let reply = match self.exchange(&Method::GET, &request, Content::Nothing, deadline)
                {
                    Err(failure) if failure.status() == Some(416) => {
                        partial.restart(None)?;
                        return Ok(Try::FromStart(failure));
                    }
                    other => other?,
                };
                if reply.response.status() == StatusCode::NOT_MODIFIED {
                    return Ok(Try::Done(Delivered::NotModified));
                }
                announced(&reply.first, &mut expected);
                let host = reply.host.clone();
                etag = strong_etag(reply.response.headers());
                if let Some(restart) = self.receive(reply, &expected, partial, max_bytes)? {
                    return Ok(restart);
                }
                host
            }
        };
        match check(&host, &expected, partial) {
            Ok(()) => Ok(Try::Done(Delivered::Whole(etag))),
            Err(failure) => {
                partial.restart(None)?;
                // Perhaps only the beginning was of another content.
                if have > 0 { Ok(Try::FromStart(failure)) } else { Err(failure) }
            }
        }
    }

    /// The body, to its end.
    fn receive(
        &self,
        reply: Reply,
        expected: &Expected,
        partial: &mut Partial,
        max_bytes: u64,
    ) -> Result<Option<Try>, Failure> {
        let Reply { response, host, .. } = reply;
        let heads = response.headers();
        let etag = strong_etag(heads);
        let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
        if is_part {
            let same = match (partial.validator(), &etag) {
                (Some(asked), Some(given)) => asked == given,
                _ => true,
            };
            if range_start(heads) != Some(partial.len()) || !same {
                let was = partial.validator().unwrap_or("another part").to_owned();
                partial.restart(None)?;
                let found = etag.unwrap_or_else(|| "another part".to_owned());
                let what = "ETag";
                return Ok(Some(Try::FromStart(Failure::Wrong {
                    host,
                    what,
                    found,
                    expected: was,
                })));
            }
        } else {
            partial.restart(etag.as_deref())?;
        }
        let length =
            heads.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        let total = length.map(|length| length.saturating_add(partial.len()));
        let too_large = |size| Failure::TooLarge { size, limit: max_bytes };
        if let Some(size) = total.or(expected.size).filter(|size| *size > max_bytes) {
            return Err(too_large(size));
        }
        if let (Some(found), Some(size)) = (total, expected.size)
            && found != size
        {
            return Err(wrong(&host, "length", found, size));
        }
        let mut body = response.into_body();
        let mut reader = body.as_reader();
        let mut buffer = vec![0; 1 << 17];
        loop {
            let read = reader.read(&mut buffer);
            if self.is_stopped() {
                return Err(Failure::Stopped);
            }
            let cut = |host, got| Failure::Cut { host, got, of: total.or(expected.size) };
            let bytes = match read {
                Ok(0) => {
                    let got = partial.len();
                    let is_short = total.or(expected.size).is_some_and(|size| got < size);
                    return if is_short { Err(cut(host, got)) } else { Ok(None) };
                }
                Ok(n) => &buffer[..n],
                Err(error) => {
                    return Err(match Failure::of(error.into(), &host, self.limits) {
                        Failure::Cut { host, .. } => cut(host, partial.len()),
                        other => other,
                    });
                }
            };
            let size = partial.len() + bytes.len() as u64;
            if size > max_bytes {
                return Err(too_large(size));
            }
            if let Some(expected) = expected.size.filter(|expected| size > *expected) {
                partial.restart(None)?;
                return Err(wrong(&host, "length", format!("over {expected}"), expected));
            }
            partial.write(bytes)?;
        }
    }
}

/// What the hub says of a file before it sends on to its storage.
fn announced(first: &HeaderMap, expected: &mut Expected) {
    let text = |name| first.get(name).and_then(|value| value.to_str().ok());
    let size = || text("x-linked-size")?.parse().ok();
    expected.size = expected.size.or_else(size);
    let digest = || parse_sha256(text("x-linked-etag")?.trim_matches('"'));
    expected.sha256 = expected.sha256.or_else(digest);
}

fn check(host: &str, expected: &Expected, partial: &Partial) -> Result<(), Failure> {
    let (sha256, md5) = partial.digests();
    if let Some(size) = expected.size.filter(|size| *size != partial.len()) {
        return Err(wrong(host, "length", partial.len(), size));
    }
    if let Some(expected) = expected.sha256.filter(|expected| *expected != sha256) {
        return Err(wrong(host, "SHA-256", hex(&sha256), hex(&expected)));
    }
    if let Some(expected) = expected.md5.filter(|expected| *expected != md5) {
        return Err(wrong(host, "MD5", hex(&md5), hex(&expected)));
    }
    Ok(())
}

fn wrong(host: &str, what: &'static str, found: impl ToString, expected: impl ToString) -> Failure {
    let (found, expected) = (found.to_string(), expected.to_string());
    Failure::Wrong { host: host.to_owned(), what, found, expected }
}

/// Only a strong ETag promises the same bytes.
fn strong_etag(heads: &HeaderMap) -> Option<String> {
    let etag = heads.get(header::ETAG)?.to_str().ok()?;
    (etag.starts_with('"') && etag.len() <= 256).then(|| etag.to_owned())
}

/// Of `Content-Range: bytes 5-9/10`, the 5.
fn range_start(heads: &HeaderMap) -> Option<u64> {
    let text = heads.get(header::CONTENT_RANGE)?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

/// 64 hexadecimal digits.
pub fn parse_sha256(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(digest)
}
