//! Third-party programs as workloads, unmodified, from Debian's packages: nginx, redis, PostgreSQL, a JVM, curl. Each is
//! started with its files in its pod's directory and is ready when the function returns.

use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::User;
use sha2::{Digest as _, Sha256};

use crate::place::Place;
use crate::poll::until;
use crate::process::{Process, run_ok};

const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A file that a web server offers: its text is `marker` over and over.
#[derive(Clone, Debug)]
pub struct Page {
    pub marker: String,
    pub bytes: Vec<u8>,
    pub sha256: [u8; 32],
}

impl Page {
    /// At least `size` bytes of lines that hold `marker` and a number.
    pub fn new(marker: &str, size: usize) -> Page {
        let mut bytes = Vec::with_capacity(size + marker.len() + 16);
        let mut number = 0;
        while bytes.len() < size {
            bytes.extend_from_slice(format!("{marker} {number}\n").as_bytes());
            number += 1;
        }
        let sha256 = Sha256::digest(&bytes).into();
        Page { marker: marker.to_owned(), bytes, sha256 }
    }
}

/// nginx on `port` of both address families, serving `page` at `/page`, `ok` at `/`, and the caller's address as it
/// sees it at `/who`.
pub fn nginx(place: &Place, port: u16, page: &Page) -> Result<Process> {
    let dir = place.dir().join("nginx");
    std::fs::create_dir_all(dir.join("html"))?;
    std::fs::write(dir.join("html/page"), &page.bytes)?;
    let root = dir.display();
    let configuration = format!(
        "daemon off;\nworker_processes 1;\npid {root}/pid;\nerror_log stderr notice;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           access_log off;\n\
           client_body_temp_path {root}/body;\nproxy_temp_path {root}/proxy;\n\
           fastcgi_temp_path {root}/fastcgi;\nuwsgi_temp_path {root}/uwsgi;\nscgi_temp_path {root}/scgi;\n\
           keepalive_requests 1000000;\n\
           server {{\n\
             listen 0.0.0.0:{port} backlog=4096;\nlisten [::]:{port} backlog=4096;\nroot {root}/html;\n\
             location = / {{ return 200 ok; }}\n\
             location = /who {{ return 200 $remote_addr; }}\n\
           }}\n\
         }}\n"
    );
    std::fs::write(dir.join("nginx.conf"), configuration)?;
    let conf = dir.join("nginx.conf");
    let process = place.start(
        "nginx",
        "nginx",
        ["-e", "stderr", "-p", &root.to_string(), "-c", &conf.to_string_lossy()],
    )?;
    place.wait_for_port(port, START_TIMEOUT)?;
    Ok(process)
}

/// redis on `port` of both address families, without a password and without a disk.
pub fn redis(place: &Place, port: u16) -> Result<Process> {
    let process = place.start(
        "redis",
        "redis-server",
        [
            "--port",
            &port.to_string(),
            "--bind",
            "0.0.0.0",
            "::",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--appendonly",
            "no",
        ],
    )?;
    place.wait_for_port(port, START_TIMEOUT)?;
    Ok(process)
}

/// PostgreSQL on port 5432 of both address families, as the user `postgres`, letting everybody in.
pub fn postgres(place: &Place) -> Result<Process> {
    let user = User::from_name("postgres")?.context("there is no user postgres: is postgresql installed?")?;
    let programs = postgres_programs()?;
    let data = place.dir().join("postgres");
    std::fs::create_dir_all(&data)?;
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700))?;
    chown(&data, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
    let path = data.to_string_lossy();
    let as_postgres = |program: &str, args: &[&str]| {
        let mut all = vec!["--reuid=postgres", "--regid=postgres", "--init-groups"];
        let program = programs.join(program);
        let program = program.to_string_lossy().into_owned();
        all.push(&program);
        all.extend(args);
        place.command("setpriv", all.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>())
    };
    run_ok(
        as_postgres("initdb", &["-D", &path, "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8"]),
        START_TIMEOUT,
    )
    .context("initdb")?;
    let access = "local all all trust\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n";
    std::fs::write(data.join("pg_hba.conf"), access)?;
    let process = place.start_command(
        "postgres",
        as_postgres("postgres", &["-D", &path, "-k", &path, "-c", "listen_addresses=*", "-c", "fsync=off"]),
    )?;
    until(START_TIMEOUT, "PostgreSQL answers", || {
        let output = place.try_run("psql", ["-h", &path, "-U", "postgres", "-Atc", "select 1"])?;
        Ok(output.stdout.starts_with(b"1"))
    })?;
    Ok(process)
}

fn postgres_programs() -> Result<PathBuf> {
    let mut versions: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .context("/usr/lib/postgresql: is postgresql installed?")?
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .filter(|bin| bin.join("postgres").is_file())
        .collect();
    versions.sort();
    versions.pop().context("no PostgreSQL server below /usr/lib/postgresql")
}

/// One SQL statement by psql; returns the unadorned result.
pub fn psql(place: &Place, server: SocketAddr, statement: &str) -> Result<String> {
    let output = place.run(
        "psql",
        [
            "-h",
            &server.ip().to_string(),
            "-p",
            &server.port().to_string(),
            "-U",
            "postgres",
            "-v",
            "ON_ERROR_STOP=1",
            "-Atc",
            statement,
        ],
    )?;
    Ok(String::from_utf8_lossy(&output).trim().to_owned())
}

/// One redis command; returns the reply.
pub fn redis_cli(place: &Place, server: SocketAddr, command: &[&str]) -> Result<String> {
    let mut args = vec!["-h".to_owned(), server.ip().to_string(), "-p".to_owned(), server.port().to_string()];
    args.extend(command.iter().map(|word| (*word).to_owned()));
    let output = place.run("redis-cli", args)?;
    Ok(String::from_utf8_lossy(&output).trim().to_owned())
}

/// curl on a fresh connection; the reply must be 200. Returns the body.
pub fn curl(place: &Place, server: SocketAddr, path: &str) -> Result<Vec<u8>> {
    place.run(
        "curl",
        ["--silent", "--show-error", "--fail", "--max-time", "20", &format!("http://{server}{path}")],
    )
}

/// curl that must receive `page`, byte by byte. Returns how many bytes that were.
pub fn curl_page(place: &Place, server: SocketAddr, page: &Page) -> Result<u64> {
    let body = curl(place, server, "/page")?;
    let sha256: [u8; 32] = Sha256::digest(&body).into();
    if sha256 != page.sha256 {
        bail!(
            "curl received {} bytes with another checksum than the {} that were served",
            body.len(),
            page.bytes.len()
        );
    }
    Ok(body.len() as u64)
}

/// Runs a Java program in one source file to its end; returns what it printed.
pub fn java(place: &Place, class: &str, source: &str, args: &[&str]) -> Result<String> {
    let file = place.dir().join(format!("{class}.java"));
    std::fs::write(&file, source)?;
    // Small heap and one compiler tier: this runs beside others on two cores.
    let mut all =
        vec!["-Xmx128m".to_owned(), "-XX:TieredStopAtLevel=1".to_owned(), "-XX:+UseSerialGC".to_owned()];
    all.push(file.to_string_lossy().into_owned());
    all.extend(args.iter().map(|arg| (*arg).to_owned()));
    let output = run_ok(place.command("java", all), Duration::from_secs(120)).context("java")?;
    Ok(String::from_utf8_lossy(&output).trim().to_owned())
}
