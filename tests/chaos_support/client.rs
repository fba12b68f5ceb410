//! A raw HTTP/1.1 client: reads at its own pace, hangs up where it likes, and says exactly what it got.

use std::{collections::BTreeMap, io, net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::sleep,
};

/// How a client behaves once its request is sent.
#[derive(Debug, Clone, Copy)]
pub enum Manner {
    /// Reads to the end.
    Patient,
    /// Hangs up once it has this many bytes.
    HangsUpAfter(usize),
    /// Hangs up after this time.
    Leaves(Duration),
    /// Reads this many bytes at a time with a pause in between.
    Slow(usize, Duration),
    /// Does not read for this time, then to the end.
    Deaf(Duration),
}

impl Manner {
    pub fn is_slow(self) -> bool {
        matches!(self, Self::Slow(..) | Self::Deaf(_))
    }
}

/// What a client got.
#[derive(Debug)]
pub enum Answer {
    /// Nobody answered: refused, reset, or closed before a byte came.
    Nothing(#[allow(dead_code)] String), // shown when it is a failure
    /// We hung up.
    HungUp,
    /// The reply broke off.
    Cut(#[allow(dead_code)] u16),
    /// A whole reply.
    Complete { status: u16, retry_after: Option<u64>, body: String },
}

/// Sends one request on a connection of its own.
pub async fn exchange(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: &str,
    manner: Manner,
) -> Answer {
    let connected = async {
        let socket = TcpSocket::new_v4()?;
        if manner.is_slow() {
            // What the kernel takes in on our behalf would count as read.
            socket.set_recv_buffer_size(4096)?;
        }
        let mut stream = socket.connect(address).await?;
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: chaos\r\nconnection: close");
        let request = format!("{head}\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await?;
        io::Result::Ok(stream)
    };
    let stream = match connected.await {
        Ok(stream) => stream,
        Err(error) => return Answer::Nothing(error.to_string()),
    };
    match manner {
        Manner::Leaves(after) => tokio::select! {
            answer = read(stream, manner) => answer,
            () = sleep(after) => Answer::HungUp,
        },
        _ => read(stream, manner).await,
    }
}

async fn read(mut stream: TcpStream, manner: Manner) -> Answer {
    let mut seen = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    if let Manner::Deaf(time) = manner {
        sleep(time).await;
    }
    loop {
        let room = match manner {
            Manner::HangsUpAfter(limit) if seen.len() >= limit => return Answer::HungUp,
            Manner::Slow(bytes, pause) => {
                sleep(pause).await;
                bytes.min(buffer.len())
            }
            _ => buffer.len(),
        };
        match stream.read(&mut buffer[..room]).await {
            Ok(0) => break,
            Ok(count) => seen.extend_from_slice(&buffer[..count]),
            Err(error) if seen.is_empty() => return Answer::Nothing(error.to_string()),
            Err(_) => break,
        }
    }
    parse(&seen)
}

fn parse(seen: &[u8]) -> Answer {
    if seen.is_empty() {
        return Answer::Nothing("closed without an answer".to_owned());
    }
    let text = String::from_utf8_lossy(seen);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Answer::Cut(0) };
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let header = |name: &str| {
        let mut lines = head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    };
    let body = match header("content-length") {
        Some(length) => Some(body.to_owned()).filter(|b| b.len().to_string() == length),
        None => dechunk(body),
    };
    let retry_after = header("retry-after").and_then(|s| s.parse().ok());
    match body {
        Some(body) => Answer::Complete { status, retry_after, body },
        None => Answer::Cut(status),
    }
}

/// The body inside chunks; `None` when the last chunk is missing.
fn dechunk(mut rest: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body += after.get(..size)?;
        rest = after.get(size..)?.strip_prefix("\r\n")?;
    }
}

/// The choices of a reply, whole or streamed.
#[derive(Debug, Default)]
pub struct Generated {
    /// Token ids and finish reason by choice.
    pub choices: BTreeMap<u64, (Vec<u32>, Option<String>)>,
    /// Generations of the cartridges that answered.
    pub generations: Vec<String>,
}

/// How a 200 of a generation route ended.
#[derive(Debug)]
pub enum Ending {
    Finished(Generated),
    /// An error event, by its code.
    Failed(String),
    /// Against the contract.
    Broken(String),
}

/// Reads the body of a 200.
pub fn ending(body: &str, stream: bool) -> Ending {
    let mut generated = Generated::default();
    if !stream {
        return match serde_json::from_str(body) {
            Ok(reply) => {
                add(&mut generated, &reply).map_or_else(Ending::Broken, |()| finished(generated))
            }
            Err(error) => Ending::Broken(error.to_string()),
        };
    }
    let events: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let Some((last, chunks)) = events.split_last() else {
        return Ending::Broken("no events".to_owned());
    };
    for chunk in chunks {
        let added = serde_json::from_str(chunk).map_err(|e| e.to_string());
        if let Err(error) = added.and_then(|chunk| add(&mut generated, &chunk)) {
            return Ending::Broken(format!("{error}: {chunk}"));
        }
    }
    if *last == "[DONE]" {
        return finished(generated);
    }
    let event: Value = serde_json::from_str(last).unwrap_or_default();
    match event["error"]["code"].as_str() {
        Some(code) => Ending::Failed(code.to_owned()),
        None => Ending::Broken(format!("ends with {last}")),
    }
}

fn finished(generated: Generated) -> Ending {
    let open = generated.choices.values().any(|(_, reason)| reason.is_none());
    if open || generated.choices.is_empty() {
        return Ending::Broken(format!("choices without a finish: {generated:?}"));
    }
    Ending::Finished(generated)
}

fn add(generated: &mut Generated, reply: &Value) -> Result<(), String> {
    let choices = reply["choices"].as_array().ok_or("no choices")?;
    for choice in choices {
        let index = choice["index"].as_u64().ok_or("no index")?;
        let (ids, reason) = generated.choices.entry(index).or_default();
        let new = choice["token_ids"].as_array().into_iter().flatten();
        ids.extend(new.filter_map(Value::as_u64).map(|id| id as u32));
        if let Some(finish) = choice["finish_reason"].as_str()
            && reason.replace(finish.to_owned()).is_some()
        {
            return Err("two finishes".to_owned());
        }
    }
    if let Some(used) = reply["cartridges"].as_array() {
        let generation = |c: &Value| c["generation"].as_str().unwrap_or_default().to_owned();
        generated.generations = used.iter().map(generation).collect();
    }
    Ok(())
}
