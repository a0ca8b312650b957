"""One strict settings file. Everything comes from the environment; in production a missing secret stops the boot.

Each setting is explained in docs/operate.md (a test compares the two).
"""

from pathlib import Path

import environ
import structlog
from csp.constants import NONCE, NONE, SELF
from django.core.exceptions import ImproperlyConfigured

from marketplace import beat

BASE_DIR = Path(__file__).resolve().parent.parent
env = environ.Env()

DEBUG = env.bool("DEBUG", default=False)
DEVELOPMENT = env.bool("DEVELOPMENT", default=False)  # one machine: loopback peers and generated secrets are allowed


def secret(name: str, development: str) -> str:
    """A secret from the environment; only on a development machine it has a default."""
    value = env.str(name, default="")
    if value:
        return value
    if DEVELOPMENT:
        return development
    raise ImproperlyConfigured(f"{name} is not set. Set it, or set DEVELOPMENT=1 on a machine of your own.")


SECRET_KEY = secret("SECRET_KEY", "development-only-key-that-signs-nothing-of-value-0123456789")
SECRETS_KEYS = env.list("SECRETS_KEYS", default=[]) or [  # Fernet keys, newest first: jobs' secrets at rest
    secret("SECRETS_KEY", "ZGV2ZWxvcG1lbnQtb25seS1mZXJuZXQta2V5LTAwMDA=")
]
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", default=["127.0.0.1", "localhost", "[::1]"])
PUBLIC_URL = env.str("PUBLIC_URL", default="http://127.0.0.1:8000")
STREAM_URL = env.str("STREAM_URL", default="http://127.0.0.1:8001")
CSRF_TRUSTED_ORIGINS = [PUBLIC_URL]

INSTALLED_APPS = [
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "django.contrib.postgres",
    "django.contrib.humanize",
    "django.contrib.admin.apps.SimpleAdminConfig",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "rest_framework",
    "drf_spectacular",
    "django_htmx",
    "django_structlog",
    "django_prometheus",
    "pgtrigger",
    "csp",
    "marketplace",
    "scheduler",
    "billing",
]

MIDDLEWARE = [
    "django_prometheus.middleware.PrometheusBeforeMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "csp.middleware.CSPMiddleware",
    "marketplace.admin.policy.AdminPolicyMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "marketplace.logs.RequestLog",
    "marketplace.actors.ActorMiddleware",
    "django_prometheus.middleware.PrometheusAfterMiddleware",
]

ROOT_URLCONF = "marketplace.urls"
WSGI_APPLICATION = "marketplace.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "marketplace" / "web" / "templates", BASE_DIR / "marketplace" / "admin" / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "builtins": ["marketplace.web.tags", "django.templatetags.static"],
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "csp.context_processors.nonce",
                "marketplace.actors.context",
            ],
        },
    }
]

# --- database: two roles. The app role serves; the owner role migrates and runs the tests.
DATABASES = {"default": env.db_url_config(secret("DATABASE_URL", "postgresql://127.0.0.1:5432/tailrace"))}
DATABASES["default"].update(
    ENGINE="marketplace.postgresql",
    CONN_MAX_AGE=env.int("CONN_MAX_AGE", default=60),
    CONN_HEALTH_CHECKS=True,
    ATOMIC_REQUESTS=False,
)
# Statements whose parameters the server binds (marketplace.prepared, marketplace.arrays) are prepared at their third call.
DATABASES["default"].setdefault("OPTIONS", {}).update(connect_timeout=5, prepare_threshold=2)
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

REDIS_URL = secret("REDIS_URL", "redis://127.0.0.1:6379/0")
CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": REDIS_URL,
        "OPTIONS": {"socket_timeout": 1, "socket_connect_timeout": 1},
    }
}

# --- Celery: tasks are at-least-once and short; the outbox, not the broker, holds what must happen
CELERY_BROKER_URL = REDIS_URL
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_TIME_LIMIT = 120
CELERY_TASK_SOFT_TIME_LIMIT = 110
CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": 900, "socket_timeout": 5, "retry_on_timeout": True}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None  # a worker outlives an outage of Redis, however long
CELERY_TASK_PUBLISH_RETRY = False  # a nudge that cannot be sent is dropped: the sweep finds the row
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_TASK_DEFAULT_QUEUE = "default"
CELERY_TIMEZONE = "UTC"  # what runs when: CELERY_BEAT_SCHEDULE, below (marketplace.beat)

# --- people
AUTH_USER_MODEL = "marketplace.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
PASSWORD_HASHERS = [f"django.contrib.auth.hashers.{name}PasswordHasher" for name in ("Scrypt", "PBKDF2")]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
]
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*"]
ACCOUNT_EMAIL_VERIFICATION = env.str("ACCOUNT_EMAIL_VERIFICATION", default="none" if DEVELOPMENT else "mandatory")
ACCOUNT_SESSION_REMEMBER, ACCOUNT_LOGOUT_ON_GET = True, False
ACCOUNT_RATE_LIMITS = (
    {"signup": "600/m/ip", "login": "600/m/ip"}
    if DEVELOPMENT
    else {"login_failed": "10/m/ip,5/5m/key", "signup": "20/m/ip"}
)
LOGIN_URL, LOGIN_REDIRECT_URL = "account_login", "/"
EMAIL_CONFIG = env.email("EMAIL_URL", default="consolemail://")
vars().update(EMAIL_CONFIG)
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL", default="Tailrace <no-reply@tailrace.invalid>")

# --- API
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "marketplace.api.auth.KeyAuthentication",
        "marketplace.api.auth.PersonAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["marketplace.api.auth.ActionPermission"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "marketplace.api.errors.handle",
    "UNAUTHENTICATED_USER": None,
    "DEFAULT_THROTTLE_CLASSES": ["marketplace.api.auth.KeyThrottle"],
    "DEFAULT_THROTTLE_RATES": {"key": env.str("API_RATE", default="6000/min")},
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Tailrace API",
    "VERSION": "1",
    "DESCRIPTION": "Book GPU capacity at converted mining sites, run jobs on it, and see what it costs to the second.",
    "OAS_VERSION": "3.1.0",
    "SERVE_INCLUDE_SCHEMA": False,
    "COMPONENT_SPLIT_REQUEST": True,
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "ENUM_NAME_OVERRIDES": {},
    "POSTPROCESSING_HOOKS": [
        "marketplace.api.schema.problems"
    ],  # enums stay where they are used: names that never move
    "SERVERS": [{"url": "/"}],
}
METRICS_TOKEN = env.str("METRICS_TOKEN", default="")  # without one, /metrics answers nobody
# --- money
STRIPE_SECRET_KEY = secret("STRIPE_SECRET_KEY", "sk_test_tailrace_sandbox")
STRIPE_BASE_URL = env.str("STRIPE_BASE_URL", default="" if not DEVELOPMENT else "http://127.0.0.1:8003")
STRIPE_WEBHOOK_SECRETS = env.list("STRIPE_WEBHOOK_SECRETS", default=["whsec_tailrace_sandbox"] if DEVELOPMENT else [])
PLATFORM_FEE_PERMILLE = env.int("PLATFORM_FEE_PERMILLE", default=150)
RESALE_FEE_PERMILLE = env.int("RESALE_FEE_PERMILLE", default=50)
LEGAL_COUNTRY = env.str("LEGAL_COUNTRY", default="US")
LEGAL_ENTITY = env.str("LEGAL_ENTITY", default="Tailrace Inc.")

# --- sites and power
MEMPOOL_URL = env.str("MEMPOOL_URL", default="http://127.0.0.1:8005" if DEVELOPMENT else "https://mempool.space")
ENERGY_PRICE_URL = env.str("ENERGY_PRICE_URL", default="http://127.0.0.1:8005/energy" if DEVELOPMENT else "")
ENERGY_PRICE_FILE = env.str("ENERGY_PRICE_FILE", default="")
GRIDSTATUS_PRICES = env.str("GRIDSTATUS_PRICES", default="")
TARIFF_PLUGINS = env.list("TARIFF_PLUGINS", default=[])
POOL_FEE_PERMILLE = env.int("POOL_FEE_PERMILLE", default=10)
SITE_LEASE_SECONDS = env.int("SITE_LEASE_SECONDS", default=900)
POWER_FREEZE = env.bool("POWER_FREEZE", default=False)
GRID_PRIVATE_HOSTS = env.bool("GRID_PRIVATE_HOSTS", default=DEVELOPMENT)
SHED_RECORD_DAYS = max(1, env.int("SHED_RECORD_DAYS", default=30))

# --- recorded cycles (scheduler.record)
CYCLE_RECORDS = env.str("CYCLE_RECORDS", default="all")
if CYCLE_RECORDS not in {"all", "waiting", "none"}:
    raise ImproperlyConfigured(f"CYCLE_RECORDS is {CYCLE_RECORDS!r}: all, waiting or none")
CYCLE_RECORD_EVERY = max(1, env.int("CYCLE_RECORD_EVERY", default=1))
CYCLE_RECORD_DAYS = env.int("CYCLE_RECORD_DAYS", default=7)
CYCLE_RECORD_KEEP = max(1, env.int("CYCLE_RECORD_KEEP", default=10_000))

# --- the spot market (marketplace.services.spot)
SPOT_LEAD_SECONDS = env.int("SPOT_LEAD_SECONDS", default=120)
if not 0 < SPOT_LEAD_SECONDS < 300:
    raise ImproperlyConfigured(f"SPOT_LEAD_SECONDS is {SPOT_LEAD_SECONDS}: 1 to 299, less than an interval")
SPOT_HISTORY_DAYS = max(62, env.int("SPOT_HISTORY_DAYS", default=180))  # a month, and that of its bill

# --- moves that make room for jobs that wait (scheduler.defrag)
DEFRAG_SECONDS = max(0, env.int("DEFRAG_SECONDS", default=60))
DEFRAG_MOVES = max(0, env.int("DEFRAG_MOVES", default=4))
DEFRAG_GAIN = max(1, env.int("DEFRAG_GAIN", default=2))
CELERY_BEAT_SCHEDULE = beat.schedule(defragment_s=DEFRAG_SECONDS if DEFRAG_MOVES else 0)

# --- screening (marketplace.services.screening)
SCREENING_PROVIDER = env.str("SCREENING_PROVIDER", default="manual")
SCREENING_URL = env.str("SCREENING_URL", default="")
SCREENING_KEY = env.str("SCREENING_KEY", default="")
SCREENING_LIST = env.str("SCREENING_LIST", default="")
SCREENING_MATCH = env.int("SCREENING_MATCH", default=85)
SCREENING_FOUR_EYES = env.bool("SCREENING_FOUR_EYES", default=False)
SCREENING_FREE_GPUS = env.int("SCREENING_FREE_GPUS", default=16)
_needs = {"manual": "SCREENING_PROVIDER", "list": "SCREENING_LIST", "http": "SCREENING_URL"}.get(SCREENING_PROVIDER)
if _needs is None or not vars()[_needs]:
    raise ImproperlyConfigured(
        f"SCREENING_PROVIDER is {SCREENING_PROVIDER!r}: manual, list (with SCREENING_LIST), http (with SCREENING_URL)"
    )
if not 50 <= SCREENING_MATCH <= 100:
    raise ImproperlyConfigured(f"SCREENING_MATCH is {SCREENING_MATCH}: 50 to 100")
SANCTIONED_COUNTRIES = env.list("SANCTIONED_COUNTRIES", default=["CU", "IR", "KP", "SY"])
EXPORT_RESTRICTED_COUNTRIES = env.str(  # as they stand: EAR country group D:5, and Macau
    "EXPORT_RESTRICTED_COUNTRIES", default="AF,BY,CD,CF,CN,CU,ER,HT,IQ,IR,KH,KP,LB,LY,MM,MO,NI,RU,SD,SO,SS,SY,VE,ZW"
).split(",")
EXPORT_FREE_GPU_MODELS = env.list("EXPORT_FREE_GPU_MODELS", default=["A2", "A10", "P40", "P100", "T4", "V100"])

# --- quotes
QUOTE_FIRM_SECONDS = env.int("QUOTE_FIRM_SECONDS", default=900)
FAIR_SHARE_HALF_LIFE_SECONDS = env.int("FAIR_SHARE_HALF_LIFE_SECONDS", default=3 * 86_400)
PROMISED_STARTS = max(0, env.int("PROMISED_STARTS", default=12))
QUOTE_HOLD_SECONDS = env.int("QUOTE_HOLD_SECONDS", default=120)
QUOTE_LIVE_HOLDS = 3

# --- saved searches (marketplace.services.saved)
SAVED_SEARCHES = max(0, env.int("SAVED_SEARCHES", default=50))
SAVED_SEARCH_IDLE_DAYS = max(8, env.int("SAVED_SEARCH_IDLE_DAYS", default=180))

# --- browser security: no host but our own. The admin (unfold) needs a weaker policy: marketplace.admin sets it, and only there.
CONTENT_SECURITY_POLICY = {
    "EXCLUDE_URL_PREFIXES": ["/operator/", "/staff/"],
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF, NONCE],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "connect-src": [SELF],
        "frame-ancestors": [NONE],
        "form-action": [
            SELF,
            *([STRIPE_BASE_URL] if STRIPE_BASE_URL else ["https://checkout.stripe.com", "https://billing.stripe.com"]),
        ],
        "base-uri": [NONE],
        "object-src": [NONE],
    },
}
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SECURE = not DEVELOPMENT
CSRF_COOKIE_SECURE = not DEVELOPMENT
SECURE_SSL_REDIRECT = env.bool("SECURE_SSL_REDIRECT", default=not DEVELOPMENT)
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if not DEVELOPMENT else None
SECURE_HSTS_SECONDS = 0 if DEVELOPMENT else 31_536_000
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
STATICFILES_DIRS = [BASE_DIR / "marketplace" / "web" / "static", BASE_DIR / "marketplace" / "admin" / "static"]
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEVELOPMENT
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}
WHITENOISE_USE_FINDERS = DEVELOPMENT

# --- the two admins' looks (unfold reads each by its site's `settings_name`; dotted names are called with the request)
_TEAL = {  # the market's own colour
    "50": "#f0fafa", "100": "#d5f0f0", "200": "#aee0e1", "300": "#79c9cc", "400": "#43a9ae", "500": "#278b92", "600": "#1f6f78",
    "700": "#1d5962", "800": "#1d4850", "900": "#1b3c44", "950": "#0b252c",
}  # fmt: skip
_ADMIN = {
    "SITE_ICON": "marketplace.admin.look.icon",
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": "marketplace.admin.look.icon"}],
    "SITE_URL": "/",
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_BACK_BUTTON": True,
    "STYLES": ["marketplace.admin.look.style"],
    "COLORS": {"primary": _TEAL},
    "BORDER_RADIUS": "6px",
}
UNFOLD_OPERATOR = {
    **_ADMIN,
    "SITE_TITLE": "Tailrace operator",
    "SITE_HEADER": "Tailrace",
    "SITE_SUBHEADER": "marketplace.admin.look.operator_name",
    "SIDEBAR": {"navigation": "marketplace.admin.look.operator_navigation"},
}
UNFOLD_STAFF = {
    **_ADMIN,
    "SITE_TITLE": "Tailrace staff",
    "SITE_HEADER": "Tailrace",
    "SITE_SUBHEADER": "Staff",
    "SIDEBAR": {"navigation": "marketplace.admin.look.staff_navigation"},
}

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False
FORMAT_MODULE_PATH = "marketplace.admin.formats"  # where a page does not say otherwise: UTC, to the second

# --- logs: one JSON object a line in production, readable lines on a development machine
_shared: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.TimeStamper(fmt="iso"),
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
]
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "()": structlog.stdlib.ProcessorFormatter,
            "processor": structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
            if DEVELOPMENT
            else structlog.processors.JSONRenderer(),
            "foreign_pre_chain": _shared,
        }
    },
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": env.str("LOG_LEVEL", default="INFO")},
    "loggers": {"django_structlog": {"level": "WARNING" if DEVELOPMENT else "INFO"}, "celery": {"level": "WARNING"}},
}
structlog.configure(
    processors=[structlog.stdlib.filter_by_level, *_shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    logger_factory=structlog.stdlib.LoggerFactory(),
    cache_logger_on_first_use=True,
)
